"""tokenizer.json as llama.cpp reads it: its tokens, their kinds, and merges or scores.

Two kinds of tokenizer are known, those of the Phi models: byte-level BPE (Phi-1 to Phi-2, Phi-4)
with its merges and the name of its pre-tokenizer, and Llama's (Phi-3, Phi-3.5), where llama.cpp
joins the pair of best score instead of the earliest merge: a merge's rank, negated, is its score.

Not here: whether the ids come out the same. The proof of an export tries it, see gguf.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ExportError
from phitune.untrusted import read_object

# Kinds of tokens, as numbered in llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Patterns of tokenizer.json that split a text before its merges, and llama.cpp's names of them.
_SPLITS = {
    # Phi-4, as GPT-4.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "dbrx",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "dbrx",
    # Phi-4-mini, as GPT-4o.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",
}
# Of a model with this in its name, llama.cpp lets all special tokens but these swallow spaces.
_SWALLOWING_NAME = "phi-3"
_NOT_SWALLOWING = ("<unk>", "<s>", "<|endoftext|>")
_REQUIRED_TOKENS = (*_NOT_SWALLOWING, "</s>")


@dataclass(frozen=True)
class FileTokenizer:
    """What goes into the file, in the order of ids."""

    model: str  # gpt2 or llama
    pre: str
    tokens: list[str]  # [V]
    kinds: list[int]  # [V]
    scores: list[float] | None  # [V], of a Llama tokenizer
    merges: list[str] | None  # of a byte-level one
    ids: Mapping[str, int]  # llama.cpp's names of special tokens: bos, eos, eot and the like
    flags: Mapping[str, bool]  # add_bos_token and the like


def file_tokenizer(coder: Coder, vocab_size: int) -> FileTokenizer:
    """Translates the tokenizer of an adapter.

    Args:
        vocab_size: rows of the model's token table, usually more than there are tokens.

    Raises:
        ExportError: llama.cpp has no such tokenizer.
    """
    tokenizer = coder.tokenizer
    path = tokenizer.folder / "tokenizer.json"
    spec = read_object(path, "a model folder needs its tokenizer")
    model = spec["model"]
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    added = spec.get("added_tokens", [])
    if too_large := [token["content"] for token in added if token["id"] >= vocab_size]:
        raise ExportError(f"{path}: tokens beyond the model's {vocab_size}: {too_large}")
    for token in added:
        index, content = token["id"], token["content"]
        tokens[index] = content
        # As in training: runs of spaces are found in any text, all others only in a template.
        kinds[index] = CONTROL if content.strip() else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    flags = {"add_bos_token": bool(tokenizer.bos_token), "add_eos_token": False}
    ids = _special_ids(coder)
    if _is_llama(spec):
        for index, token in enumerate(tokens):
            if kinds[index] == NORMAL and token.startswith("<0x") and len(token) == len("<0x00>"):
                kinds[index] = BYTE
        if "unknown" in ids:
            kinds[ids["unknown"]] = UNKNOWN
        flags["add_space_prefix"] = True
        scores = _scores(tokens, merges)
        return FileTokenizer("llama", "default", tokens, kinds, scores, None, ids, flags)
    pre = _pre_tokenizer(spec, path)
    return FileTokenizer("gpt2", pre, tokens, kinds, None, merges, ids, flags)


def name_in_file(tokenizer: TextTokenizer, model_name: str) -> str:
    """The model's name with or without "phi-3" in it, by which llama.cpp decides on spaces.

    Phi-3's special tokens take the spaces and newlines after them ("rstrip"). A file cannot say so:
    llama.cpp does it where the model's name contains "phi-3".
    """
    last = model_name.rstrip("/").rpartition("/")[2] or "model"
    spec = read_object(tokenizer.folder / "tokenizer.json", "")
    special = [token for token in spec.get("added_tokens", []) if token["content"].strip()]
    swallows = {token["content"]: bool(token["rstrip"]) for token in special}
    as_phi_3 = all(token in swallows for token in _REQUIRED_TOKENS) and all(
        swallowing == (token not in _NOT_SWALLOWING) for token, swallowing in swallows.items()
    )
    named = any(part in last.lower() for part in (_SWALLOWING_NAME, "phi3"))
    if as_phi_3 and not named:
        return f"Phi-3 {last}"
    if named and not as_phi_3:
        return last.lower().replace("phi-3", "phi 3").replace("phi3", "phi 3")
    return last


def _special_ids(coder: Coder) -> dict[str, int]:
    """Special tokens by llama.cpp's names; it stops at eos, eot and eom."""
    tokenizer = coder.tokenizer
    ids = {"eos": tokenizer.token_id(coder.prompt_format.end_token)}
    others = [index for index in coder.stop_ids if index != ids["eos"]]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    for ours, theirs in (("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        if token := tokenizer.special_tokens.get(ours):
            ids[theirs] = tokenizer.token_id(token)
    return ids


def stop_tokens(coder: Coder) -> list[str]:
    """The texts of all tokens that end an answer, the format's own first."""
    tokenizer = coder.tokenizer
    by_id = {tokenizer.token_id(token): token for token in tokenizer.control_tokens}
    stops = [by_id[index] for index in coder.stop_ids]
    return sorted(stops, key=lambda token: token != coder.prompt_format.end_token)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list; a sequence of them as its parts."""
    if not isinstance(component, dict):
        return []
    for key in ("normalizers", "pretokenizers"):
        if key in component:
            return [part for inner in component[key] for part in _parts(inner)]
    return [component]


def _is_llama(spec: Mapping[str, Any]) -> bool:
    if not spec["model"].get("byte_fallback"):
        return False
    kinds = {part["type"] for part in _parts(spec.get("normalizer"))}
    kinds |= {part["type"] for part in _parts(spec.get("pre_tokenizer"))}
    return "Prepend" in kinds or "Metaspace" in kinds


def _pre_tokenizer(spec: Mapping[str, Any], path: Any) -> str:
    parts = _parts(spec.get("pre_tokenizer"))
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "phi-2"  # GPT-2's pattern.
    if kinds == ["Split", "ByteLevel"]:
        pattern = parts[0].get("pattern", {}).get("Regex", "")
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    raise ExportError(
        f"{path}: llama.cpp has no tokenizer for its pre_tokenizer"
        f" {json.dumps(spec.get('pre_tokenizer'))}; --format merged has no such limit"
    )


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """A token's score is the negated rank of its first merge; what no merge makes has the last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]
