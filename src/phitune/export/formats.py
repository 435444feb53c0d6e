"""What `phitune export` can write. No torch here: `--help` lists it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One of the formats."""

    what: str  # for --help
    module: str  # of this package, with `export(Export) -> Proof`
    options: tuple[str, ...] = ()  # the flags that mean something to it


FORMATS = {
    "merged": Format(
        "the whole model with the adapter in it, for transformers, vLLM and the like",
        "merged",
        ("dtype", "max_shard_size"),
    ),
    "adapter": Format("the adapter alone, as PEFT and vLLM load it beside its base", "adapter"),
    "gguf": Format(
        "the whole model as a file for llama.cpp, with a Modelfile for Ollama",
        "gguf_model",
        ("quantization",),
    ),
    "gguf-lora": Format("the adapter alone, for llama-server --lora", "gguf_lora"),
}
