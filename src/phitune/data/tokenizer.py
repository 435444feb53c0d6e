"""Text to token ids and back: the tokenizer of a model folder, and rows as tokens.

tokenizer.json is read with the `tokenizers` library; truncation, padding and dropout saved in it
are switched off, since they would change rows silently. What is added here are the seams:

- Special tokens are recognised only where the prompt format put them; the same characters typed by
  a user stay text.
- A prompt and its answer are encoded apart, so that the ids of a prompt do not depend on what
  follows it: those of training are those of inference, at every turn.
- Llama-style tokenizers put a space in front of every text, also in the middle of a conversation;
  there a second tokenizer without that habit is used.

Knows segments but no prompt formats (see coder.py), no data files, no torch. The last section
guards the library, which a stranger's tokenizer.json can make panic or write texts without end.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from phitune.data.conversation import Example
from phitune.data.prompt import Segment
from phitune.errors import ModelError, listing
from phitune.untrusted import flag, own_file, read_object, read_text, whole, write_object

# --- Rows as tokens ------------------------------------------------------------------------------

IGNORE_INDEX = -100  # the label of a token that is not trained, as in torch's cross entropy
Span = tuple[int, int]  # start and stop of trained tokens in a row


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row as tokens; `labels` repeats the id where it is trained, else IGNORE_INDEX."""

    input_ids: list[int]  # [tokens]
    labels: list[int]  # [tokens]
    line: int = 0

    @property
    def num_target_tokens(self) -> int:
        """Trained positions: the first token is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(slots=True)
class EncodedRow:
    """One row as tokens, with its trained spans in order instead of labels."""

    example: Example
    input_ids: list[int]  # [tokens]; none of a row that was not encoded
    spans: list[Span]
    at_least: int = 0  # tokens that a long row has at least, by its characters alone

    @property
    def is_encoded(self) -> bool:
        return bool(self.input_ids) or not self.at_least

    def tokenized(self) -> TokenizedExample:
        return TokenizedExample(
            self.input_ids, labels_of(self.input_ids, self.spans), self.example.line
        )


def labels_of(input_ids: Sequence[int], spans: Iterable[Span]) -> list[int]:
    """The id where it is trained, else IGNORE_INDEX. [tokens]"""
    labels = [IGNORE_INDEX] * len(input_ids)
    for start, stop in spans:
        labels[start:stop] = input_ids[start:stop]
    return labels


# --- The tokenizer of a model folder -------------------------------------------------------------

TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Of each of these files. Phi-4-mini's tokenizer.json, with 200,000 tokens, has half of it.
MAX_FILE_BYTES = 2**25
_NAMED_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


@dataclass(frozen=True, slots=True)
class _ControlToken:
    content: str
    id: int
    lstrip: bool  # takes the spaces before it
    rstrip: bool  # takes the spaces after it


class _Piece(NamedTuple):
    """A part of a conversation that is encoded as one."""

    content: str | int  # a text, or the id of a special token
    at_start: bool  # of a text: nothing or a special token comes before it
    trained: bool


class TextTokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path) -> None:
        """Reads tokenizer.json and tokenizer_config.json.

        Raises:
            ModelError: one of them is missing or damaged.
        """
        self.folder = folder
        self._file = folder / "tokenizer.json"
        spec = read_object(self._file, self._if_missing(), MAX_FILE_BYTES)
        self._check_files_to_copy()
        self.config = _read_if_there(folder / "tokenizer_config.json")
        self._special_tokens_map = _read_if_there(folder / "special_tokens_map.json")

        # What would change rows silently.
        spec["truncation"] = spec["padding"] = None
        if isinstance(spec.get("model"), dict):
            spec["model"].pop("dropout", None)

        # Runs of spaces (Phi-2 has 38) are vocabulary; every other added token is control.
        try:
            added = added_tokens(spec)
        except ModelError as error:
            raise ModelError(f"{self._file}: invalid: {error}") from None
        self._control = {
            token["content"]: _ControlToken(
                token["content"],
                token["id"],
                bool(token.get("lstrip")),
                bool(token.get("rstrip")),
            )
            for token in added
            if token["content"].strip()
        }
        pre_tokenizer = spec.get("pre_tokenizer")
        self._check_other_files(added, pre_tokenizer if isinstance(pre_tokenizer, dict) else {})
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._control_ids = {token.id for token in self._control.values()}

        # The two tokenizers of plain text.
        plain = {**spec, "added_tokens": [t for t in added if t["content"] not in self._control]}
        self._at_start = load(plain, self._file)
        self._within = load(_without_leading_space(plain), self._file)

        self.special_tokens = self._special_tokens()  # such as {"eos_token": "<|endoftext|>"}
        self.bos_token = self._automatic_bos(spec)  # in front of every text, or ""
        self.chat_template: str | None = None
        self.no_default: NoDefaultTemplateError | None = None  # why none of several is taken
        try:
            self.chat_template = read_chat_template(folder)
        except NoDefaultTemplateError as error:  # Rows in the instruct format need none.
            self.no_default = error

    @property
    def control_tokens(self) -> list[str]:
        return list(self._control)

    @functools.cached_property
    def size(self) -> int:
        """One more than the largest id."""
        ids = self._at_start.get_vocab(with_added_tokens=True).values()
        return 1 + max([*ids, *self._control_ids], default=-1)

    @functools.cached_property
    def most_characters(self) -> int | None:
        """The most characters of a text that one token can stand for; None if nobody knows.

        Known of tokenizers that have a token for every byte and take no character out of a text.
        """
        spec = json.loads(self._at_start.to_str())
        vocabulary = self._at_start.get_vocab(with_added_tokens=True)
        model = spec.get("model") or {}
        kinds = _kinds(spec.get("pre_tokenizer"), "pretokenizers")
        by_bytes = "ByteLevel" in kinds and len(_BYTE_LETTERS & vocabulary.keys()) == 256
        by_fallback = model.get("byte_fallback") and all(
            f"<0x{byte:02X}>" in vocabulary for byte in range(256)
        )
        keeps_all = kinds <= _KEEPING_PIECES and _kinds(spec.get("normalizer"), "normalizers") <= {
            "Prepend",
            "Replace a space",
        }
        if model.get("type") != "BPE" or not keeps_all or not (by_bytes or by_fallback):
            return None
        return max(map(len, vocabulary), default=None)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides ids."""
        digest = hashlib.sha256((self.folder / "tokenizer.json").read_bytes())
        digest.update(json.dumps([self.special_tokens, self.bos_token]).encode())
        return digest.hexdigest()

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer by eos_token and by generation_config.json.

        Control tokens alone: a wrong id there (Phi-2's config says 2, a "#") would end answers
        early.
        """
        declared = _read_if_there(self.folder / "generation_config.json").get("eos_token_id")
        listed = declared if isinstance(declared, list) else [declared]
        ids = self._control_ids & {one for one in listed if isinstance(one, int)}
        if "eos_token" in self.special_tokens:
            ids.add(self.token_id(self.special_tokens["eos_token"]))
        return ids

    def token_id(self, token: str) -> int:
        """The id of a special token."""
        return self._control[token].id

    # Encoding

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of one conversation. [tokens]"""
        ((ids, _),) = self.encode_batch([segments])
        return ids

    def encode_batch(
        self, conversations: Sequence[Sequence[Segment]]
    ) -> Iterator[tuple[list[int], list[Span]]]:
        """Token ids of each conversation and the spans that are trained, encoded on all cores."""
        rows = [self._pieces(segments) for segments in conversations]
        encoded_at_start = self._encoded(self._at_start, rows, at_start=True)
        encoded_within = self._encoded(self._within, rows, at_start=False)
        for pieces in rows:
            ids: list[int] = []
            spans: list[Span] = []
            for content, at_start, trained in pieces:
                start = len(ids)
                if isinstance(content, int):
                    ids.append(content)
                else:
                    ids += next(encoded_at_start if at_start else encoded_within).ids
                if trained and spans and spans[-1][1] == start:
                    spans[-1] = (spans[-1][0], len(ids))
                elif trained:
                    spans.append((start, len(ids)))
            yield ids, spans

    def _encoded(
        self, tokenizer: Tokenizer, rows: Sequence[Sequence[_Piece]], *, at_start: bool
    ) -> Iterator[Any]:
        """The library's encoding of each text of the rows that is for this tokenizer, in order."""
        texts = [
            piece.content
            for pieces in rows
            for piece in pieces
            if isinstance(piece.content, str) and piece.at_start == at_start
        ]
        with library_errors(self._file):
            if len(rows) == 1:  # Without the library's threads, whose stacks and heaps take memory.
                return iter([tokenizer.encode(text, add_special_tokens=False) for text in texts])
            return iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def _pieces(self, segments: Sequence[Segment]) -> list[_Piece]:
        """The special tokens of segments, and the texts between them."""
        pieces: list[_Piece] = []
        text = ""  # gathered up to the next special token or change of `trained`
        at_start = True  # of `text`
        trained = False
        strip_next = False  # The special token before takes the spaces after it.
        for segment in segments:
            if segment.trained != trained:
                if text:
                    pieces.append(_Piece(text, at_start, trained))
                    text, at_start = "", False
                trained = segment.trained
            if not segment.control:
                text += segment.text
                strip_next = False
                continue
            position = 0
            for match in self._control_pattern.finditer(segment.text):
                token = self._control[match.group()]
                literal = segment.text[position : match.start()]
                literal = literal.lstrip() if strip_next else literal
                text += literal.rstrip() if token.lstrip else literal
                if text:
                    pieces.append(_Piece(text, at_start, trained))
                pieces.append(_Piece(token.id, True, trained))
                text, at_start = "", True
                position, strip_next = match.end(), token.rstrip
            literal = segment.text[position:]
            text += literal.lstrip() if strip_next else literal
        if text:
            pieces.append(_Piece(text, at_start, trained))
        return pieces

    def decode_answer(self, ids: Sequence[int], prompt_ids: Sequence[int]) -> str:
        """The text of an answer that follows `prompt_ids`, without its special tokens."""
        at_start = not prompt_ids or prompt_ids[-1] in self._control_ids
        tokenizer = self._at_start if at_start else self._within
        kept = [token for token in ids if token not in self._control_ids]
        with library_errors(self._file):
            return str(tokenizer.decode(kept, skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for within a text; it may be a part of a letter. Nothing where
        there is no such token.
        """
        written = self._within.id_to_token(token)
        special = next((each for each in self._control.values() if each.id == token), None)
        if special is not None or written is None:
            return special.content.encode() if special else b""
        if self._is_by_bytes and all(letter in _BYTE_OF for letter in written):
            return bytes(_BYTE_OF[letter] for letter in written)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", written):
            return bytes([int(byte[1], 16)])
        return written.replace("\u2581", " ").encode()

    @functools.cached_property
    def _is_by_bytes(self) -> bool:
        """Whether tokens are written in `_BYTE_LETTERS`."""
        decoder = json.loads(self._within.to_str()).get("decoder")
        return "ByteLevel" in _kinds(decoder, "decoders")

    # Files

    def save(self, folder: Path, chat_template: str, stop_ids: Sequence[int]) -> None:
        """Copies the tokenizer, with another chat template and the tokens that end an answer.

        The template is written where old and new readers look for it, the stop ids into
        generation_config.json.
        """
        for name in TOKENIZER_FILES:
            if source := own_file(self.folder / name):
                shutil.copyfile(source, folder / name)
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        # This class takes tokenizer.json as it is. Away from the model's config.json, readers go
        # by its name, and LlamaTokenizer has its own idea of leading spaces.
        changes = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template}
        # auto_map has names of Python files, which some readers would fetch and run.
        kept = {key: value for key, value in self.config.items() if key != "auto_map"}
        write_object(folder / "tokenizer_config.json", {**kept, **changes})
        write_object(folder / "generation_config.json", {"eos_token_id": list(stop_ids)})

    def _if_missing(self) -> str:
        for name in ("tokenizer.model", "vocab.json"):
            if (self.folder / name).is_file():
                return (
                    f"there is {name}, from which transformers writes it:"
                    " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
        return "a model folder needs its tokenizer"

    def _check_files_to_copy(self) -> None:
        """Refuses files that `save` must not copy: now, not at the end of a run."""
        for name in TOKENIZER_FILES:
            file = own_file(self.folder / name)
            if file and file.stat().st_size > MAX_FILE_BYTES:
                raise ModelError(
                    f"{file}: has more than {MAX_FILE_BYTES:,} bytes, the limit for such a file"
                )

    def _check_other_files(
        self, added: Sequence[dict[str, Any]], pre_tokenizer: dict[str, Any]
    ) -> None:
        """Refuses what other files say of the tokenizer and tokenizer.json says in another way.

        transformers goes by them, and gives added tokens that are new another id than the file
        says. added_tokens.json counts where tokenizer_config.json lists none.
        """
        known = {token["content"]: token for token in added}
        problems = []
        if self.config.get("split_special_tokens"):
            problems.append("split_special_tokens of tokenizer_config.json: the tokens are split")
        wanted, has = self.config.get("add_prefix_space"), pre_tokenizer.get("add_prefix_space")
        if isinstance(wanted, bool) and isinstance(has, bool) and wanted != has:
            problems.append(
                f"add_prefix_space of tokenizer_config.json: {wanted} there, and {has} here"
            )
        for name, token in self._added_elsewhere():
            content = token.get("content")
            own = known.get(str(content))
            if own is None:
                problems.append(f"{content!r} of {name}: not among the added tokens")
                continue
            problems += [
                f"{content!r} of {name}: {key} is {token[key]!r} there, and {own.get(key)!r} here"
                for key in ("id", "lstrip", "rstrip")
                if key in token
                and token[key] != (own.get(key) if key == "id" else bool(own.get(key)))
            ]
        if problems:
            raise ModelError(
                f"{self._file}: other files of this tokenizer say something else:\n"
                + listing(problems)
                + "\nLet transformers write one that has all of them, and look at their ids:"
                " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )

    def _added_elsewhere(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each token that another file adds: where it is named, and what is said of it."""
        listed = self.config.get("added_tokens_decoder")
        if isinstance(listed, dict):
            for place, token in listed.items():
                values = token if isinstance(token, dict) else {"content": token}
                yield "tokenizer_config.json", {**values, "id": _as_id(place)}
        else:
            for text, place in _read_if_there(self.folder / "added_tokens.json").items():
                yield "added_tokens.json", {"content": text, "id": place}
        for name in ("bos_token", "eos_token"):
            file, content = self._named(name)
            if content:
                yield f"{file} ({name})", {"content": content}
        for name in ("additional_special_tokens", "extra_special_tokens"):
            more = self.config.get(name)
            for token in more if isinstance(more, list) else []:
                yield (
                    f"tokenizer_config.json ({name})",
                    {"content": token.get("content") if isinstance(token, dict) else token},
                )

    def _named(self, name: str) -> tuple[str, str | None]:
        """The content of bos_token or the like, and the file that decides it for transformers."""
        files = {
            "tokenizer_config.json": self.config,
            "special_tokens_map.json": self._special_tokens_map,
        }
        if "added_tokens_decoder" not in self.config:
            files = dict(reversed(files.items()))
        for file, values in files.items():
            token = values.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and content:
                return file, content
        return next(iter(files)), None

    def _special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and the like by name, as far as the tokenizer has them."""
        found = {}
        for name in _NAMED_TOKENS:
            _, content = self._named(name)
            if content in self._control:
                found[name] = str(content)
        return found

    def _automatic_bos(self, spec: dict[str, Any]) -> str:
        """The token that the tokenizer itself puts in front of a text, or ""."""
        tokenizer = load(spec, self._file)
        with_special = tokenizer.encode("a", add_special_tokens=True).ids
        without = tokenizer.encode("a", add_special_tokens=False).ids
        if len(with_special) <= len(without) or with_special[:1] == without[:1]:
            return ""
        bos = [token.content for token in self._control.values() if token.id == with_special[0]]
        if not bos:
            raise ModelError(
                f"{self._file}: invalid: it puts the token {with_special[0]} in front of a text,"
                " which is none of its added tokens"
            )
        return bos[0]


class NoDefaultTemplateError(ModelError):
    """There are several chat templates, and none of them is the default."""


_MAX_TEMPLATES, _MAX_NAME = 9, 40  # names of templates in a message, characters of a name


def read_chat_template(folder: Path) -> str | None:
    """The chat template in a folder of a tokenizer; None where it has none.

    Of several by name the one named "default", as transformers takes it.

    Raises:
        NoDefaultTemplateError: no template of several has that name.
        ModelError: a file that cannot be read.
    """
    if file := own_file(folder / "chat_template.jinja"):
        return read_text(file, "")
    further = folder / "additional_chat_templates"
    names = sorted(path.stem for path in further.glob("*.jinja"))
    if "default" in names:
        return read_text(further / "default.jinja", "")
    if not names:
        template = _read_if_there(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):
            entries = [entry for entry in template if isinstance(entry, dict)]
            template = {str(entry.get("name")): entry.get("template") for entry in entries}
        if isinstance(template, dict):
            names, template = sorted(template), template.get("default")
        if isinstance(template, str) or not names or "default" in names:
            return template if isinstance(template, str) else None
    shown = ", ".join(repr(name[:_MAX_NAME]) for name in names[:_MAX_TEMPLATES])
    raise NoDefaultTemplateError(
        f"{folder}: its chat templates are named {shown}, and none is named 'default', which a chat"
        " without tools or documents uses; save the one that is meant as chat_template.jinja there"
    )


# Each byte as a letter, as byte-level tokenizers write it: those that can be printed as they are.
_PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}
_BYTE_OF = {chr(byte): byte for byte in _PRINTED}
_BYTE_OF |= {
    chr(256 + place): byte
    for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}
_BYTE_LETTERS = _BYTE_OF.keys()
# Steps that cut a text into pieces and lose nothing of it.
_KEEPING_PIECES = {"ByteLevel", "Metaspace", "Digits", "Split"}


def _kinds(component: Any, parts: str) -> set[str]:
    """The kinds of a tokenizer's component and of its parts; those that may shorten a text are
    named otherwise."""
    if not isinstance(component, dict):
        return set()
    if component.get("type") == "Sequence":
        return set().union(*(_kinds(part, parts) for part in component.get(parts, [])))
    if component.get("behavior") == "Removed":
        return {"removes"}
    if component.get("type") == "Replace":
        is_space = component.get("pattern") == {"String": " "} and component.get("content")
        return {"Replace a space" if is_space else "replaces"}
    return {str(component.get("type"))}


def _without_leading_space(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that continues: no space put in front, none stripped."""

    def strip(component: Any) -> Any:
        if not isinstance(component, dict):
            return component
        kind = component.get("type")
        if kind == "Prepend" or (kind == "Strip" and component.get("start")):
            return None
        changed = dict(component)
        if kind == "Metaspace":
            changed["prepend_scheme"] = "never"
        if "add_prefix_space" in changed:
            changed["add_prefix_space"] = False
        for key in ("normalizers", "pretokenizers", "decoders"):
            if key in changed:
                changed[key] = [kept for part in changed[key] if (kept := strip(part))]
        return changed

    parts = ("normalizer", "pre_tokenizer", "decoder")
    return {**spec, **{part: strip(spec.get(part)) for part in parts}}


def _as_id(place: str) -> int | str:
    return int(place) if place.isdecimal() and len(place) < 10 else place


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path, "") if own_file(path) else {}


# --- The tokenizers library, guarded -------------------------------------------------------------
#
# The library trusts its file. Some contents make it panic, which is no Exception in Python and
# writes to the terminal: turned into an error. Some rules make a text grow without end, which ends
# the process: refused from the file alone.

_MAX_ADDED, _MAX_TOKEN, _MAX_ID = 20_000, 1000, 2**31 - 1
# How many times as long a text may become by all rules together. Phi's keep its length, or double
# it (bytes become letters).
_MAX_GROWTH = 100
# How many times as long a rule can make a text, where that is more than once.
_GROWTH = {"ByteLevel": 2, "NFD": 4, "NFC": 3, "NFKD": 18, "NFKC": 18, "Nmt": 1, "Precompiled": 18}
_PROBE = "Hello world 1, 2!\n\n  \u00e9\U0001f600 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"
_MAX_MESSAGE = 300  # characters of the library's own message


def load(spec: dict[str, Any], file: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, tried on a text.

    Raises:
        ModelError: it is not usable.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(spec.get(part))) > _MAX_GROWTH:
            raise ModelError(
                f"{file}: invalid: its {part} makes a text up to {growth:,} times as long"
            )
    with _silent(), library_errors(file):
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        for special in (False, True):
            tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=special).ids)
    return tokenizer


def added_tokens(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, each with content, id, lstrip and rstrip.

    Raises:
        ModelError: they are not what such a file holds.
    """
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > _MAX_ADDED:
        raise ModelError(f"added_tokens is not a list of at most {_MAX_ADDED:,} tokens")
    for index, token in enumerate(added):
        _check_added(token, f"added_tokens[{index}]")
    return added


def _check_added(token: Any, name: str) -> None:
    if not isinstance(token, dict):
        raise ModelError(f"{name} is not an object")
    content = token.get("content")
    if not isinstance(content, str) or not 0 < len(content) <= _MAX_TOKEN:
        raise ModelError(f"{name}: content is not a text of 1 to {_MAX_TOKEN:,} characters")
    try:
        whole(token, "id", 0, _MAX_ID)
        flag(token, "lstrip")
        flag(token, "rstrip")
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None


@contextlib.contextmanager
def library_errors(file: Path) -> Iterator[None]:
    """Turns what the library raises into an error that names the file."""
    try:
        yield
    except BaseException as error:  # The library raises Exception; its panic is none.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            lines = str(error).splitlines() or [type(error).__name__]
            raise ModelError(f"{file}: invalid: {lines[0][:_MAX_MESSAGE]}") from None
        raise


def _growth(component: Any) -> int:
    """How many times as long a text can become by a component and those it consists of."""
    growth, rest = 1, [component]
    while rest and growth <= _MAX_GROWTH**2:
        one = rest.pop()
        if isinstance(one, list):
            rest += one
        if not isinstance(one, dict):
            continue
        rest += [one.get(key) for key in ("normalizers", "pretokenizers", "decoders")]
        growth *= _GROWTH.get(str(one.get("type")), 1)
        for key in ("content", "prepend", "replacement"):
            text = one.get(key)
            if isinstance(text, str):
                growth *= max(1, len(text) if one.get("type") != "Strip" else 1)
    return growth


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discards what other languages write to the process's error stream."""
    try:
        kept = os.dup(2)
    except OSError:  # There is no such stream.
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
