"""What `phitune export` can write. No torch here: `--help` lists it."""

from dataclasses import dataclass

# -------------------------------------------------------------------------------------------------
# The quantisations of `--format gguf`. No torch here: `--help` lists them.

DEFAULT = "f16"


@dataclass(frozen=True)
class Quantization:
    """One of them, and how far the file may be from the adapter in memory.

    Rounding weights to 16 bits hardly changes a model: the greedy answers have to be the same.
    Fewer bits do change it, so that a token may differ; what is bounded then is how much less
    probable the adapter's own answers become.

    Args:
        python: the gguf package can write it; else llama.cpp's own tool does.
        weight_error: the largest root mean square error of a tensor, relative to that of its
            weights. A quantiser that rounds to b bits in blocks of Gaussian weights makes about
            (2.5 / 2**b) of error; this is twice that and more.
        perplexity: how much the perplexity of the adapter's answers may rise, as a share; None
            where tokens are held equal. llama.cpp's own tables have a tenth of it on large models,
            which lose less than small ones.
    """

    python: bool
    weight_error: float
    perplexity: float | None = None


QUANTIZATIONS = {
    "f32": Quantization(True, 1e-6),
    "f16": Quantization(True, 1e-3),
    "bf16": Quantization(True, 5e-3),
    "q8_0": Quantization(True, 0.02, 0.02),
    "q6_k": Quantization(False, 0.06, 0.05),
    "q5_1": Quantization(True, 0.12, 0.1),
    "q5_0": Quantization(True, 0.12, 0.1),
    "q5_k_m": Quantization(False, 0.12, 0.1),
    "q5_k_s": Quantization(False, 0.12, 0.1),
    "q4_1": Quantization(True, 0.25, 0.3),
    "q4_0": Quantization(True, 0.25, 0.3),
    "q4_k_m": Quantization(False, 0.25, 0.3),
    "q4_k_s": Quantization(False, 0.25, 0.3),
    "q3_k_m": Quantization(False, 0.5, 1.0),
}


# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """One of the formats."""

    what: str  # for --help
    module: str  # of this package
    function: str  # in it, `(Export) -> Proof`
    options: tuple[str, ...] = ()  # the flags that mean something to it


FORMATS = {
    "merged": Format(
        "the whole model with the adapter in it, for transformers, vLLM and the like",
        "safetensors",
        "export_merged",
        ("dtype", "max_shard_size"),
    ),
    "adapter": Format(
        "the adapter alone, as PEFT and vLLM load it beside its base",
        "safetensors",
        "export_adapter",
    ),
    "gguf": Format(
        "the whole model as a file for llama.cpp, with a Modelfile for Ollama",
        "gguf",
        "export_model",
        ("quantization",),
    ),
    "gguf-lora": Format("the adapter alone, for llama-server --lora", "gguf", "export_lora"),
}
