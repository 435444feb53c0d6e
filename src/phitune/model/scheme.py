"""How a model folder's files hold its weights: plain, or quantised already and by which scheme.

`quantization_config` of config.json says it; a GGUF file in the place of safetensors does, too.
What is not read is refused by its own name. Nothing here loads torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phitune.errors import ModelError
from phitune.untrusted import flag, own_file, read_object, whole

Reader = Literal["bitsandbytes", "scaled", "awq", "gptq", "gguf"]
StoreKind = Literal["int8", "nf4"]  # what weights are held in, see stores.py
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Scheme:
    """A way in which frozen weights are quantised in files."""

    name: str  # for people
    reader: Reader
    # The store that takes its numbers as they are; without one they are expanded while loading.
    kind: StoreKind | None = None
    bits: int = 4  # of GPTQ's and AWQ's numbers
    group: int = -1  # inputs that share a scale; -1 for all
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale, of fp8
    adds_one: bool = True  # whether GPTQ's zero points are one less in the file


# Schemes that are not read, by quant_method.
_OTHERS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM's FP8",
    "fp_quant": "FP-Quant",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt's NVFP4 and FP8",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
_READ = (
    "read are bitsandbytes' nf4 and int8, compressed-tensors' int8 and FP8, FP8 in blocks, GPTQ,"
    " AWQ and GGUF files"
)
_INSTEAD = "name the unquantised model that it was made from, with --quantization nf4 or int8"


def read_scheme(folder: Path) -> Scheme | None:
    """How the weights of a model folder are quantised; None where they are plain.

    Raises:
        ModelError: config.json is damaged, or names a scheme that is not read.
    """
    if gguf_file(folder):
        return Scheme("GGUF", "gguf")
    path = folder / "config.json"
    if own_file(path) is None:  # Nothing says that they are anything but plain.
        return None
    raw = read_object(path, "")
    try:
        return parse_scheme(raw)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file that a folder has in the place of safetensors.

    Raises:
        ModelError: there are several.
    """
    if any((folder / name).is_file() for name in SAFETENSORS):
        return None
    found = sorted(path for path in folder.glob("*.gguf") if own_file(path))
    if len(found) > 1:
        raise ModelError(
            f"{folder}: has {len(found)} GGUF files ({', '.join(path.name for path in found[:3])});"
            " put the one to use into a folder of its own, with config.json and the tokenizer"
        )
    return found[0] if found else None


def parse_scheme(raw: Mapping[str, Any]) -> Scheme | None:
    """What config.json says of how weights are quantised; see `read_scheme`."""
    section = raw.get("quantization_config") or raw.get("quantization")
    if not section:
        return None
    if not isinstance(section, Mapping):
        raise ModelError(f"quantization_config is a {type(section).__name__}, expected an object")
    method = section.get("quant_method")
    parse = {
        "bitsandbytes": _bitsandbytes,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "gptq": _gptq,
        "awq": _awq,
    }.get(method if isinstance(method, str) else "")
    if parse:
        return parse(section)
    if method is None and section.keys() >= {"group_size", "bits"}:
        raise _refusal("MLX's own quantisation")
    if method is None:
        raise _refusal("a scheme without a quant_method")
    raise _refusal(_OTHERS.get(str(method), f"quant_method {method!r}"))


def _refusal(name: str) -> ModelError:
    return ModelError(f"quantization_config: {name} is not read ({_READ}); {_INSTEAD}")


def _bitsandbytes(section: Mapping[str, Any]) -> Scheme:
    if flag(section, "load_in_8bit") or flag(section, "_load_in_8bit"):
        return Scheme("bitsandbytes int8", "bitsandbytes", "int8")
    # transformers takes fp4 where nothing is said.
    kind = section.get("bnb_4bit_quant_type") or "fp4"
    if kind != "nf4":
        raise _refusal(f"bitsandbytes' {kind}")
    if section.get("bnb_4bit_quant_storage") not in (None, "uint8"):
        storage = section["bnb_4bit_quant_storage"]
        raise _refusal(f"bitsandbytes' nf4 packed as {storage!r}, not as uint8,")
    twice = ", scales quantised too" if flag(section, "bnb_4bit_use_double_quant") else ""
    return Scheme(f"bitsandbytes nf4{twice}", "bitsandbytes", "nf4")


def _compressed_tensors(section: Mapping[str, Any]) -> Scheme:
    form = section.get("format")
    groups = section.get("config_groups")
    if form not in ("int-quantized", "float-quantized", "naive-quantized"):
        raise _refusal(f"compressed-tensors' {form}")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelError("quantization_config has no config_groups")
    found = {_compressed_group(group) for group in groups.values()}
    if len(found) > 1:
        raise _refusal("compressed-tensors with several kinds of weights")
    return found.pop()


def _compressed_group(group: object) -> Scheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ModelError("quantization_config.config_groups has a group without weights")
    kind, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
    known = strategy in ("channel", "tensor") or (kind == "float" and strategy == "block")
    if kind not in ("int", "float") or bits != 8 or not known:
        raise _refusal(f"compressed-tensors' {kind} of {bits} bits with a scale a {strategy}")
    if weights.get("symmetric") is False:
        raise _refusal("compressed-tensors with zero points")
    if kind == "int":
        return Scheme("compressed-tensors int8", "scaled", "int8")
    block = _block(weights.get("block_structure")) if strategy == "block" else None
    return Scheme("compressed-tensors FP8", "scaled", bits=8, block=block)


def _block(value: object) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, list) else ()
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= 2**16 for size in sizes):
        raise ModelError(f"quantization_config: a block of {value!r}, expected two whole numbers")
    return sizes[0], sizes[1]


def _fp8(section: Mapping[str, Any]) -> Scheme:
    if section.get("fmt", "e4m3") != "e4m3":
        raise _refusal(f"FP8 in the format {section['fmt']!r}")
    return Scheme(
        "FP8 in blocks",
        "scaled",
        bits=8,
        block=_block(section.get("weight_block_size", [128, 128])),
    )


def _group(section: Mapping[str, Any]) -> int:
    if section.get("group_size") == -1:
        return -1
    return whole(section, "group_size", 1, 2**18, default=128)


def _gptq(section: Mapping[str, Any]) -> Scheme:
    bits = whole(section, "bits", 1, 16)
    form = section.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise _refusal(f"GPTQ in the format {form!r}")
    if bits not in (2, 4, 8):
        raise _refusal(f"GPTQ of {bits} bits")
    name, group = f"GPTQ of {bits} bits", _group(section)
    return Scheme(name, "gptq", bits=bits, group=group, adds_one=form == "gptq")


def _awq(section: Mapping[str, Any]) -> Scheme:
    bits = whole(section, "bits", 1, 16, default=4)
    version = str(section.get("version") or "gemm").lower()
    if version != "gemm":
        raise _refusal(f"AWQ in the layout {version!r}")
    if bits != 4:
        raise _refusal(f"AWQ of {bits} bits")
    return Scheme("AWQ of 4 bits", "awq", group=_group(section))
