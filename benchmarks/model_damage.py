"""Model and adapter folders, and what can be wrong with them: for fuzz_models.py.

A folder is a dictionary of file names to bytes, or to a `Link` or `Special` where it is no plain
file. Every damage takes a folder and changes it in place; each is drawn from a seed.
"""

import copy
import json
import random
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.model.architecture import ModelConfig, parse_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.files import ASSETS
from phitune.model.llama_layout import parts_of
from phitune.model.lora import LoraSpec, attach, save_adapter


@dataclass(frozen=True)
class Link:
    target: str


@dataclass(frozen=True)
class Special:
    kind: str  # "folder", "pipe", or "hole": 100 MB of zeros that take no room


Folder = dict[str, bytes | Link | Special]
Random = random.Random
SECRET = "secret.txt"  # beside the folder of a case
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def whole_folders(base_paths: dict[str, Path]) -> dict[str, Folder]:
    """Small random models of both families, one of them in shards, and adapters on them.

    One adapter is in Llama's layout, which has Phi-3's projections apart.
    """
    found = {}
    for kind, shipped in (("phi", "tiny-phi-2"), ("phi3", "tiny-phi-3.5")):
        source = ASSETS / shipped
        raw = json.loads((source / "config.json").read_text()) | _SMALL
        if kind == "phi3":
            factors = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
            raw["rope_scaling"] = {"type": "longrope", **factors}
        else:
            raw["partial_rotary_factor"] = 0.5
        torch.manual_seed(0)
        decoder = Decoder(parse_model_config(raw))
        weights = {name: torch.randn_like(w) * 0.1 for name, w in decoder.named_weights().items()}
        model: Folder = {path.name: path.read_bytes() for path in source.iterdir()}
        model["config.json"] = json.dumps(raw).encode()
        model[WEIGHTS] = save(weights, metadata={"format": "pt"})
        found[f"{kind} model"] = model
        found[f"{kind} sharded"] = _sharded(model, weights)
        found[f"{kind} adapter"] = _adapter(decoder, source, base_paths[kind])
    found["phi3 adapter in parts"] = _in_parts(found["phi3 adapter"], decoder.config)
    return found


def _sharded(model: Folder, weights: dict[str, torch.Tensor]) -> Folder:
    folder = {name: content for name, content in model.items() if name != WEIGHTS}
    names = sorted(weights)
    files = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        folder[file] = save({name: weights[name] for name in part})
        files |= dict.fromkeys(part, file)
    folder[INDEX] = json.dumps({"metadata": {}, "weight_map": files}).encode()
    return folder


def _adapter(decoder: Decoder, source: Path, base: Path) -> Folder:
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(2, 4.0, 0.0, modules), seed=0)
    tokenizer = TextTokenizer(source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adapter(adapter, folder, str(base))
        Coder.of(tokenizer, "instruct").save(folder)
        files: Folder = {path.name: path.read_bytes() for path in folder.iterdir()}
    tensors = load(files[ADAPTER])  # type: ignore[arg-type]
    for key in tensors:
        if ".lora_B" in key:  # Zeros in a fresh one, which would hide what becomes of it.
            tensors[key] = torch.randn_like(tensors[key]) * 0.1
    return {**files, ADAPTER: save(tensors, metadata={"format": "pt"})}


def _in_parts(adapter: Folder, config: ModelConfig) -> Folder:
    """An adapter of Phi-3 with random matrices on each of the parts in its place."""
    raw, weights = adapter["adapter_config.json"], adapter[ADAPTER]
    assert isinstance(raw, bytes)
    assert isinstance(weights, bytes)
    tensors = load(weights)
    for module, parts in parts_of(config).items():
        del tensors[f"base_model.model.{module}.lora_A.weight"]
        del tensors[f"base_model.model.{module}.lora_B.weight"]
        for part, rows in parts.items():
            name = f"base_model.model.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, config.hidden_size)
            tensors[f"{name}.lora_B.weight"] = torch.randn(len(rows), 2)
    targets = sorted({name.split(".")[-3] for name in tensors})
    options = {**json.loads(raw), "target_modules": targets}
    return {
        **adapter,
        "adapter_config.json": json.dumps(options).encode(),
        ADAPTER: save(tensors, metadata={"format": "pt"}),
    }


def with_parts_added(model: Folder, adapter: Folder, config: ModelConfig) -> Folder:
    """A model whose fused weights have the matrices of an adapter in parts added, W + s B A."""
    raw, base, added = adapter["adapter_config.json"], model[WEIGHTS], adapter[ADAPTER]
    assert isinstance(raw, bytes)
    assert isinstance(base, bytes)
    assert isinstance(added, bytes)
    options, weights, matrices = json.loads(raw), load(base), load(added)
    whole = {
        module: (module, slice(None)) for module in resolve_targets(config, ["all-linear"], None)
    }
    for module, parts in parts_of(config).items():
        whole |= {part: (module, slice(rows.start, rows.stop)) for part, rows in parts.items()}
    for name, (module, rows) in whole.items():
        prefix = f"base_model.model.{name}"
        if f"{prefix}.lora_A.weight" in matrices:
            product = matrices[f"{prefix}.lora_B.weight"] @ matrices[f"{prefix}.lora_A.weight"]
            weights[f"{module}.weight"][rows] += options["lora_alpha"] / options["r"] * product
    return {**model, WEIGHTS: save(weights, metadata={"format": "pt"})}


# Values of the wrong type, size or sense, for any place in any JSON.
_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**60, 10**9, 10**400, -(10**18), 0.5, -1.5),
    *(1e300, -1e300, float("nan"), float("inf"), float("-inf"), "", "a", "0", "..", "../../x", "/"),
    *("/etc/passwd", "\0", "\ud800", "x" * 5000, "~nobody/x", "a/b", "\x1b[2J", "{{", "<|end|>"),
    *([], {}, [[]], [1], ["a"], {"a": 1}, [None] * 50, {"type": "Sequence"}, {"content": 5}),
)
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "sliding_window"),
    *("original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "rms_norm_eps"),
    *("layer_norm_eps", "tie_word_embeddings", "model_type", "hidden_act", "rope_scaling"),
)
_ADAPTER_KEYS = (
    *("r", "lora_alpha", "lora_dropout", "peft_type", "use_dora", "use_rslora", "bias"),
    *("rank_pattern", "modules_to_save", "target_modules", "base_model_name_or_path"),
)
_TEMPLATES = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10 ** (10 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n + 1) ~ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "{% set n = namespace(x=3) %}{% for i in range(9999) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch /tmp/x') }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('\x1b[2J' * 1000) }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ messages[0].content.x.y }}{{ 1 / 0 }}",
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{{ m['role'] + m['content'] }}{% if loop.last %}{% break %}{% endif %}",
)
_COMPONENTS: dict[str, tuple[Any, ...]] = {
    "normalizer": (
        {"type": "Replace", "pattern": {"String": ""}, "content": "ab"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60,
        },
        {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 60},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Prepend", "prepend": "a" * 10**6},
    ),
    "pre_tokenizer": (
        {
            "type": "Split",
            "pattern": {"Regex": "(a+)+$"},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        {"type": "FixedLength", "length": 0},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True},
    ),
    "decoder": (
        {"type": "Strip", "content": " ", "start": 2**40, "stop": 2**40},
        {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 10**6},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    ),
    "post_processor": (
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
        {
            "type": "RobertaProcessing",
            "sep": ["a", 2**32 - 1],
            "cls": ["b", 2**31],
            "trim_offsets": True,
            "add_prefix_space": True,
        },
    ),
    "truncation": ({"max_length": 1, "strategy": "LongestFirst", "stride": 0},),
    "padding": ({"strategy": {"Fixed": 10**9}, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},),
    "model": (
        {"type": "WordLevel", "vocab": {}, "unk_token": "no"},
        {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 9},
        {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]},
    ),
}


def damaged(rng: Random, folder: Folder, base: Path) -> tuple[Folder, list[str]]:
    """A copy of a folder with one to three damages, and their names."""
    folder = dict(folder)
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(DAMAGES))
        DAMAGES[name](rng, folder, base)
        names.append(name)
    return folder, names


def _file(rng: Random, folder: Folder, ending: str = "") -> str | None:
    """The name of a plain file, or none where they are all gone."""
    names = [name for name in sorted(folder) if name.endswith(ending)]
    plain = [name for name in names if isinstance(folder[name], bytes)]
    return rng.choice(plain) if plain else None


def _bytes(rng: Random, folder: Folder, base: Path) -> None:
    """Bits flipped, pieces cut out, doubled, put in; the file cut off."""
    name = _file(rng, folder)
    if name is None:
        return
    content = folder[name]
    assert isinstance(content, bytes)
    # Half of the time in the beginning, where headers are.
    at = rng.randrange(min(len(content), rng.choice((400, 10**9))) + 1)
    piece = rng.choice((1, 2, 8, 100, 4096))
    head, tail = content[:at], content[at:]
    folder[name] = rng.choice(
        (
            lambda: head + bytes(byte ^ 1 << rng.randrange(8) for byte in tail[:1]) + tail[1:],
            lambda: head + bytes([rng.randrange(256)]) + tail[1:],
            lambda: head + tail[piece:],
            lambda: head,
            lambda: head + tail[:piece] + tail,
            lambda: head + rng.randbytes(piece) + tail,
            lambda: head + rng.choice((b'"', b"{", b"]", b"\0", b"\xff", b"\xef\xbb\xbf")) + tail,
        )
    )()


def _json(rng: Random, folder: Folder, base: Path) -> None:
    """A value anywhere in a JSON file replaced, taken out, or put under another name."""
    name = _file(rng, folder, ".json")
    if name is None:
        return
    try:
        content = json.loads(folder[name])  # type: ignore[arg-type]
    except (ValueError, RecursionError):
        return
    _mutate(rng, content)
    folder[name] = json.dumps(content).encode()


def _mutate(rng: Random, content: Any) -> None:
    place = content
    for _ in range(rng.randrange(5)):
        inner = list(place.values()) if isinstance(place, dict) else place
        deeper = [one for one in inner if isinstance(one, dict | list) and one]
        if not deeper:
            break
        place = rng.choice(deeper)
    if not isinstance(place, dict | list) or not place:
        return
    key: Any = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    match rng.randrange(6):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[rng.choice(("x", "", "type", "id"))] = place.pop(key)
        case _:
            place[key] = copy.deepcopy(rng.choice(_STRANGE))


def _settings(rng: Random, folder: Folder, base: Path) -> None:
    """A setting that decides sizes or kinds, set to what it cannot be."""
    for name, keys in (("config.json", _SIZES), ("adapter_config.json", _ADAPTER_KEYS)):
        content = folder.get(name)
        if isinstance(content, bytes):
            _set(rng, folder, name, rng.choice(keys), rng.choice(_STRANGE))


def _set(rng: Random, folder: Folder, name: str, key: str, value: Any) -> None:
    content = folder.get(name)
    if not isinstance(content, bytes):
        return
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):
        return
    if isinstance(raw, dict):
        folder[name] = json.dumps({**raw, key: value}).encode()


def _header(rng: Random, folder: Folder, base: Path) -> None:
    """A safetensors header that lies."""
    name = _file(rng, folder, ".safetensors")
    if name is None:
        return
    content = folder[name]
    assert isinstance(content, bytes)
    try:
        length = struct.unpack("<Q", content[:8])[0]
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        tensor = rng.choice([key for key in header if key != "__metadata__"])
        entry = header[tensor]
        begin, end = entry["data_offsets"]
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, struct.error):
        return
    claimed = None
    match rng.randrange(12):
        case 0:
            claimed = rng.choice((0, 1, 2**20, 2**32, 2**60, 2**63, 2**64 - 1, length - 1))
        case 1:
            entry["shape"] = rng.choice(([2**50], [2**32, 2**32], [-1], [0], [], [1.5], [True]))
        case 2:
            entry["shape"] = rng.choice((_STRANGE, [[float("nan")], [10**30], entry["shape"] * 9]))
        case 3:
            entry["data_offsets"] = rng.choice(
                ([0, 4], [end, begin], [begin + 4, end + 4], [0, 2**63], [-4, 0], [begin], _STRANGE)
            )
        case 4:
            entry["dtype"] = rng.choice(("I8", "F64", "F4", "F8_E4M3", "C64", "BOOL", "NO", 5, []))
        case 5:
            other = rng.choice(list(header))
            header[other], header[tensor] = header[tensor], header[other]
        case 6:
            header[rng.choice(("../x", "/etc/passwd", "\0", "x" * 9000))] = header.pop(tensor)
        case 7:
            del header[tensor]
        case 8:
            header["__metadata__"] = rng.choice(_STRANGE)
        case 9:
            header[tensor] = rng.choice(_STRANGE)
        case 10:
            _mutate(rng, header)
        case 11:
            header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [begin, begin]}
    written = json.dumps(header, default=str).encode()
    if rng.randrange(20) == 0:  # The same name twice.
        written = b'{"%s":{},' % tensor.encode() + written[1:]
    folder[name] = struct.pack("<Q", len(written) if claimed is None else claimed) + written + data


def _numbers(rng: Random, folder: Folder, base: Path) -> None:
    """Numbers that are none, and numbers of another type."""
    name = _file(rng, folder, ".safetensors")
    if name is None:
        return
    try:
        tensors = load(folder[name])  # type: ignore[arg-type]
    except Exception:  # Damaged before; the library raises whatever it likes.
        return
    for key in rng.sample(sorted(tensors), min(3, len(tensors))):
        if rng.randrange(3) == 0:
            kinds = (torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64)
            values = tensors[key]  # complex numbers by an earlier damage
            tensors[key] = (values.abs() if values.is_complex() else values).to(rng.choice(kinds))
        elif tensors[key].is_floating_point():
            # Halves, which an earlier damage may have made, do not reach as far.
            largest = min(1e38, torch.finfo(tensors[key].dtype).max)
            tensors[key].fill_(rng.choice((float("nan"), float("inf"), largest, 0.0)))
    folder[name] = save(tensors)


def _files(rng: Random, folder: Folder, base: Path) -> None:
    """Files missing, exchanged, empty, or no files at all."""
    name, other = _file(rng, folder), _file(rng, folder)
    if name is None or other is None:
        return
    match rng.randrange(6):
        case 0:
            del folder[name]
        case 1:
            folder[name], folder[other] = folder[other], folder[name]
        case 2:
            folder[name] = b""
        case 3:
            folder[name] = Special(rng.choice(("folder", "pipe", "hole")))
        case 4:
            for file in [file for file in folder if file.endswith(".safetensors")]:
                folder[f"{file.split('.')[0]}.bin"] = folder.pop(file)
        case 5:
            added = rng.choice(("vocab.json", "merges.txt", "tokenizer.model", INDEX))
            folder[added] = rng.choice((b"", b"{}", b"[1]", Special("hole"), Special("folder")))


_INSTEAD = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n",
    *(
        b"<!DOCTYPE html><html>",
        b"\n<html>",
        b"Entry not found",
        b'{"error":"no"}',
        b" \n",
        b"\0" * 999,
    ),
    *(
        b"PK\x03\x04" + b"x" * 99,
        b"\x80\x02}q\x00.",
        b"GGUF\x03\0\0\0",
        b"\x1f\x8b\x08",
        b"\xef\xbb\xbf{}",
    ),
)


def _instead(rng: Random, folder: Folder, base: Path) -> None:
    """A pointer, a page, a pickle or the like in the place of a file."""
    if name := _file(rng, folder):
        folder[name] = rng.choice(_INSTEAD)


def _tokens_elsewhere(rng: Random, folder: Folder, base: Path) -> None:
    """Added tokens that another file than tokenizer.json names."""
    content = rng.choice(("<|end|>", "<|im_end|>", "</s>", "[PAD]", " ", "", "\0"))
    place = rng.choice((5, 999, 1000, 10**9, -1, "5", None))
    name, key = rng.choice((("added_tokens.json", content), ("tokenizer_config.json", "")))
    if key or name == "added_tokens.json":
        folder[name] = json.dumps({content: place}).encode()
        _set(rng, folder, "tokenizer_config.json", "added_tokens_decoder", None)
        return
    token = rng.choice(({"content": content, "rstrip": True}, content, None, {"content": 5}))
    _set(rng, folder, name, "added_tokens_decoder", {str(place): token})


def _links(rng: Random, folder: Folder, base: Path) -> None:
    """Links to elsewhere, to nowhere, to themselves, and to devices."""
    names = [*sorted(folder), "vocab.json", "merges.txt", "chat_template.jinja"]
    targets = (f"../{SECRET}", str(base / "config.json"), "/dev/zero", "/etc/passwd", "no", "..")
    name = rng.choice(names)
    folder[name] = Link(rng.choice((*targets, name, rng.choice(names))))


def _index(rng: Random, folder: Folder, base: Path) -> None:
    """An index that leads elsewhere."""
    places = ("../x.safetensors", "/etc/passwd", "..", ".", "", "\0", "config.json", "a" * 300, 5)
    files = {"model.embed_tokens.weight": rng.choice((*places, f"../{SECRET}", WEIGHTS, None))}
    folder[INDEX] = json.dumps(
        rng.choice(({"weight_map": files}, {"weight_map": [files]}, {"weight_map": None}, [files]))
    ).encode()


def _template(rng: Random, folder: Folder, base: Path) -> None:
    """A chat template that goes on for ever, fills the memory, or looks around."""
    text = rng.choice(_TEMPLATES)
    if rng.randrange(3) == 0:
        other = rng.choice(_TEMPLATES)
        text = text[: rng.randrange(len(text))] + other[rng.randrange(len(other)) :]
    if rng.randrange(20) == 0:
        text *= 2000
    if rng.randrange(2):
        folder["chat_template.jinja"] = text.encode()
    else:
        folder.pop("chat_template.jinja", None)
        value = rng.choice((text, [{"name": "default", "template": text}], [text], {"a": text}))
        _set(rng, folder, "tokenizer_config.json", "chat_template", value)


def _tokenizer(rng: Random, folder: Folder, base: Path) -> None:
    """Parts of a tokenizer.json that the library chokes on."""
    part = rng.choice(sorted(_COMPONENTS))
    _set(rng, folder, "tokenizer.json", part, rng.choice(_COMPONENTS[part]))


def _special_tokens(rng: Random, folder: Folder, base: Path) -> None:
    """Special tokens that are something else."""
    name = rng.choice(
        ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    )
    key = rng.choice(
        ("eos_token", "bos_token", "unk_token", "eos_token_id", "added_tokens_decoder")
    )
    _set(rng, folder, name, key, rng.choice(_STRANGE))


def _bombs(rng: Random, folder: Folder, base: Path) -> None:
    """JSON that is deep, long, or one number."""
    name = _file(rng, folder, ".json")
    if name is None:
        return
    depth = rng.choice((70, 500, 900, 5000, 200_000))
    folder[name] = rng.choice(
        (
            lambda: b"[" * depth + b"]" * depth,
            lambda: b'{"a":' * depth + b"1" + b"}" * depth,
            lambda: b'{"a": ' + b"9" * depth + b"}",
            lambda: b'{"a": "' + b"\\ud800" * depth + b'"}',
            lambda: b'{"a": [' + b"[]," * (3 * 10**6) + b"[]]}",
            lambda: b"{" + b",".join(b'"%d": 0' % n for n in range(depth)) + b"}",
        )
    )()


DAMAGES: dict[str, Callable[[Random, Folder, Path], None]] = {
    "bytes": _bytes,
    "json values": _json,
    "sizes and settings": _settings,
    "tensor headers": _header,
    "numbers": _numbers,
    "files": _files,
    "other files": _instead,
    "added tokens": _tokens_elsewhere,
    "links": _links,
    "index": _index,
    "chat template": _template,
    "tokenizer parts": _tokenizer,
    "special tokens": _special_tokens,
    "json bombs": _bombs,
}
