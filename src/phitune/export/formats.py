"""The formats of `phitune export` and their settings. No torch here: `--help` lists them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Format:
    """A form in which another program loads an adapter."""

    what: str  # for --help
    options: tuple[str, ...] = ()  # the flags that only some formats have


FORMATS = {
    "merged": Format(
        "the whole model with the adapter in its weights, for transformers and vLLM",
        ("dtype", "max_shard_size", "merge_into"),
    ),
    "adapter": Format("the adapter alone, as PEFT and vLLM load it beside its base"),
    "gguf": Format(
        "the whole model as a file for llama.cpp, with a Modelfile for Ollama", ("quantization",)
    ),
    "gguf-lora": Format("the adapter alone, for llama-server --lora"),
}

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9  # bytes
DEFAULT_QUANTIZATION = "f16"


@dataclass(frozen=True)
class ExportSettings:
    """What the user asked for; each format reads its own options."""

    format: str  # one of FORMATS
    overwrite: bool = False  # an earlier export in the same place
    device: str = "auto"  # of the models that the proof compares, as `precision`
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    dtype: Literal["base", "fp32", "bf16"] = "base"  # of merged weights
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE
    merge_into: Literal["original", "trained"] = "original"  # the base of merged weights
    quantization: str = DEFAULT_QUANTIZATION  # one of QUANTIZATIONS


@dataclass(frozen=True)
class Quantization:
    """A type of a GGUF file's weights, and how far the file may be from the adapter in memory.

    Rounding weights to 16 bits hardly changes a model: the greedy answers have to be the same.
    With fewer bits the model changes and a token may differ; what is bounded then is how much less
    probable the adapter's own answers become.

    Args:
        python: the gguf package can write it; else llama.cpp's own tool does.
        weight_error: the largest root mean square error of a tensor, relative to that of its
            weights. A quantiser that rounds Gaussian weights to b bits in blocks has an error of
            about 2.5 / 2**b; this is at least twice that.
        perplexity: how much the perplexity of the adapter's answers may rise, as a share; None
            where tokens have to be equal. llama.cpp's own tables show a tenth of it for large
            models, which lose less than small ones.
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
