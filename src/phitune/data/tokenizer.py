"""Segments to token ids and labels, and ids back to text.

tokenizer.json is read with the `tokenizers` library; truncation, padding and dropout saved in it
are switched off, since they would change rows silently. What this file adds is the seam:

- Text and the special tokens around it are encoded apart, so that a special token typed by a user
  stays text.
- An answer and what comes before it are encoded apart, so that the ids of a prompt do not depend on
  what follows it: those of training are those inference feeds, at every turn.
- Llama-style tokenizers put a space in front of every text, also where the text goes on; a second
  encoder without that habit is used there.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from phitune.data.dataset import Example
from phitune.data.prompt import ChatFormat, InstructFormat, PromptFormat, Segment
from phitune.errors import ModelError
from phitune.untrusted import flag, own_file, read_object, read_text, whole, write_object

# -------------------------------------------------------------------------------------------------
# The tokenizers library, kept from what a stranger's tokenizer.json can make it do.
#
# It trusts its file: some contents make it panic (which is no Exception in Python, and writes to
# the terminal), and some rules make a text grow without end, which ends the process. The second is
# refused from the file alone; the first becomes an error like any other.

MAX_ADDED, MAX_TOKEN, MAX_ID = 20_000, 1000, 2**31 - 1
# Times that the rules of a tokenizer.json may lengthen a text, all together; Phi's do not at all,
# or twice where bytes become letters.
MAX_GROWTH = 100
_PROBE = "Hello world 1, 2!\n\n  \u00e9\U0001f600 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"
# What a step does to the length of a text at most, where it is more than nothing.
_GROWTH = {"ByteLevel": 2, "NFD": 4, "NFC": 3, "NFKD": 18, "NFKC": 18, "Nmt": 1, "Precompiled": 18}


def added_tokens(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, each with content, id, lstrip and rstrip.

    Raises:
        ModelError: they are not what such a file holds.
    """
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_ADDED:
        raise ModelError(f"added_tokens is not a list of at most {MAX_ADDED:,} tokens")
    for index, token in enumerate(added):
        _check_added(token, f"added_tokens[{index}]")
    return added


def _check_added(token: Any, name: str) -> None:
    if not isinstance(token, dict):
        raise ModelError(f"{name} is not an object")
    content = token.get("content")
    if not isinstance(content, str) or not 0 < len(content) <= MAX_TOKEN:
        raise ModelError(f"{name}: content is not a text of 1 to {MAX_TOKEN:,} characters")
    try:
        whole(token, "id", 0, MAX_ID)
        flag(token, "lstrip")
        flag(token, "rstrip")
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None


def load(spec: dict[str, Any], file: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, tried on a text.

    Raises:
        ModelError: it is not usable.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(spec.get(part))) > MAX_GROWTH:
            raise ModelError(
                f"{file}: not usable: its {part} makes a text up to {growth:,} times as long"
            )
    with _silent(), library_errors(file):
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        for special in (False, True):
            tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=special).ids)
    return tokenizer


@contextlib.contextmanager
def library_errors(file: Path) -> Iterator[None]:
    """Turns what the library raises into an error that names the file."""
    try:
        yield
    except BaseException as error:
        # The library raises nothing narrower; and a panic of it is a BaseException.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            said = str(error).splitlines() or [type(error).__name__]
            raise ModelError(f"{file}: not usable: {said[0][:300]}") from None
        raise


def _growth(step: Any) -> int:
    """How many times as long a text may get in a step, and in those it consists of."""
    growth, rest = 1, [step]
    while rest and growth <= MAX_GROWTH**2:
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
    """Sends what is written to the terminal's error stream by other languages to nowhere."""
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


# -------------------------------------------------------------------------------------------------
# A row as tokens, and which of them are trained. No torch here.

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row as tokens; `labels` repeats the id where it is trained, else IGNORE_INDEX."""

    input_ids: list[int]  # [T]
    labels: list[int]  # [T]
    line: int = 0

    @property
    def num_target_tokens(self) -> int:
        """Trained positions: the first token is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(slots=True)
class EncodedRow:
    """One row as tokens, its trained parts as (start, stop) in their order."""

    example: Example
    input_ids: list[int]  # [T]
    spans: list[tuple[int, int]]

    def tokenized(self) -> TokenizedExample:
        return TokenizedExample(
            self.input_ids, labels_of(self.input_ids, self.spans), self.example.line
        )


def labels_of(input_ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    """The id where it is trained, else IGNORE_INDEX. [T]"""
    labels = [IGNORE_INDEX] * len(input_ids)
    for start, stop in spans:
        labels[start:stop] = input_ids[start:stop]
    return labels


# -------------------------------------------------------------------------------------------------

TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# Rows and characters that are encoded in one call, enough for all cores.
BATCH_ROWS, BATCH_CHARACTERS = 2048, 2**21
# Of each of its files; that of Phi-4-mini, which has 200,000 tokens, is half of it.
MAX_FILE_BYTES = 2**25
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class _ControlToken:
    content: str
    id: int
    lstrip: bool
    rstrip: bool


class TextTokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path) -> None:
        """Reads tokenizer.json and tokenizer_config.json.

        Raises:
            ModelError: one of them is missing or damaged.
        """
        self.folder = folder
        self._file = folder / "tokenizer.json"
        spec = read_object(self._file, "a model folder needs its tokenizer", MAX_FILE_BYTES)
        self._check_copied()
        self.config = _read_if_there(folder / "tokenizer_config.json")
        spec["truncation"] = spec["padding"] = None
        if isinstance(spec.get("model"), dict):
            spec["model"].pop("dropout", None)
        try:
            added = added_tokens(spec)
        except ModelError as error:
            raise ModelError(f"{self._file}: not usable: {error}") from None
        # Runs of spaces (Phi-2 has 38) are vocabulary; every other added token is control.
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
        names = sorted(self._control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._control_ids = {token.id for token in self._control.values()}
        plain = {**spec, "added_tokens": [t for t in added if t["content"] not in self._control]}
        self._start = load(plain, self._file)
        self._continue = load(_without_leading_space(plain), self._file)
        self.special_tokens = self._special_tokens()
        self.bos_token = self._automatic_bos(spec)
        self.chat_template = self._chat_template()

    @property
    def control_tokens(self) -> list[str]:
        return list(self._control)

    @functools.cached_property
    def size(self) -> int:
        """One more than the largest id."""
        ids = self._start.get_vocab(with_added_tokens=True).values()
        return 1 + max([*ids, *(token.id for token in self._control.values())], default=-1)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes ids."""
        digest = hashlib.sha256((self.folder / "tokenizer.json").read_bytes())
        digest.update(json.dumps([self.special_tokens, self.bos_token]).encode())
        return digest.hexdigest()

    def token_id(self, token: str) -> int:
        """The id of a special token."""
        return self._control[token].id

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of segments that belong together, without regard to what follows them."""
        return self._assemble(self._pieces(segments), self._encode_text)[0]

    def encode_example(
        self, prompt_format: PromptFormat, example: Example, *, train_on_prompt: bool = False
    ) -> TokenizedExample:
        """A row as the model sees it, with every answer and its end token trained."""
        pieces = self._pieces(prompt_format.segments(example.turns))
        ids, spans = self._assemble(pieces, self._encode_text)
        spans = _without_first(spans, len(ids), train_on_prompt)
        return EncodedRow(example, ids, spans).tokenized()

    def encode_many(
        self,
        prompt_format: PromptFormat,
        examples: Iterable[Example],
        *,
        train_on_prompt: bool = False,
    ) -> Iterator[TokenizedExample]:
        """`encode_example` of each, many at once on all cores."""
        rows = self.encode_rows(prompt_format, examples, train_on_prompt=train_on_prompt)
        return (row.tokenized() for row in rows)

    def encode_rows(
        self,
        prompt_format: PromptFormat,
        examples: Iterable[Example],
        *,
        train_on_prompt: bool = False,
    ) -> Iterator[EncodedRow]:
        """`encode_many` without the labels written out."""
        for batch in _batches(examples):
            plans = [self._pieces(prompt_format.segments(example.turns)) for example in batch]
            texts: tuple[list[str], list[str]] = [], []
            for plan in plans:
                for what, starts, _ in plan:
                    if isinstance(what, str):
                        texts[starts].append(what)
            with library_errors(self._file):
                encoded = [
                    iter(tokenizer.encode_batch_fast(part, add_special_tokens=False))
                    for tokenizer, part in zip((self._continue, self._start), texts, strict=True)
                ]

            def in_order(text: str, starts: bool, encoded: Any = encoded) -> list[int]:
                ids: list[int] = next(encoded[starts]).ids
                return ids

            for example, plan in zip(batch, plans, strict=True):
                ids, spans = self._assemble(plan, in_order)
                yield EncodedRow(example, ids, _without_first(spans, len(ids), train_on_prompt))

    def decode_answer(self, ids: Sequence[int], prompt_ids: Sequence[int]) -> str:
        """The text of an answer that follows `prompt_ids`, without its special tokens."""
        starts = not prompt_ids or prompt_ids[-1] in self._control_ids
        tokenizer = self._start if starts else self._continue
        kept = [token for token in ids if token not in self._control_ids]
        with library_errors(self._file):
            return str(tokenizer.decode(kept, skip_special_tokens=False))

    def prompt_format(self, name: Literal["instruct", "chat"]) -> PromptFormat:
        """The named format in this tokenizer's special tokens.

        Raises:
            ModelError: chat is asked of a model that has no chat template, or no end token.
        """
        end_token = self.special_tokens.get("eos_token")
        if not end_token:
            raise ModelError(f"{self.folder}: tokenizer_config.json names no eos_token")
        if name == "instruct":
            return InstructFormat(end_token, self.bos_token)
        if not self.chat_template:
            raise ModelError(
                f"{self.folder}: this model has no chat template; use --prompt_format instruct"
            )
        try:
            return ChatFormat.from_template(
                self.chat_template, self.special_tokens, self.control_tokens, self.bos_token
            )
        except ModelError as error:
            raise ModelError(f"{self.folder}: {error}") from None

    def stop_ids(self, prompt_format: PromptFormat) -> list[int]:
        """Tokens that end an answer: the format's end token, and those the model came with."""
        ids = {self.token_id(prompt_format.end_token)}
        if "eos_token" in self.special_tokens:
            ids.add(self.token_id(self.special_tokens["eos_token"]))
        saved = _read_if_there(self.folder / "generation_config.json")
        declared = saved.get("eos_token_id")
        # Only control tokens: a wrong id here (Phi-2's config says 2, a "#") would cut answers.
        listed = declared if isinstance(declared, list) else [declared]
        return sorted(ids | (self._control_ids & {one for one in listed if isinstance(one, int)}))

    def save(self, folder: Path, prompt_format: PromptFormat) -> None:
        """Copies the tokenizer, with a chat template that renders `prompt_format`.

        The template goes where old and new readers look for it; the stop ids go into
        generation_config.json.
        """
        for name in TOKENIZER_FILES:
            if source := own_file(self.folder / name):
                shutil.copyfile(source, folder / name)
        template = prompt_format.chat_template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        # The class that takes tokenizer.json as it is. Away from the model's config.json, readers
        # go by this name, and LlamaTokenizer has its own idea of leading spaces.
        changes = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
        # Names of Python files, which some readers would fetch and run.
        kept = {key: value for key, value in self.config.items() if key != "auto_map"}
        write_object(folder / "tokenizer_config.json", {**kept, **changes})
        write_object(
            folder / "generation_config.json", {"eos_token_id": self.stop_ids(prompt_format)}
        )

    def _pieces(self, segments: Sequence[Segment]) -> list["_Piece"]:
        """The special tokens of segments, and the texts between them."""
        pieces: list[_Piece] = []
        text = ""  # Plain text gathered up to the next special token or answer, encoded as one.
        starts = True  # Whether that text follows a special token or nothing at all.
        trained = False
        swallow = False  # Whether the special token before takes the spaces after it.
        for segment in segments:
            if segment.trained != trained:
                if text:
                    pieces.append((text, starts, trained))
                    text, starts = "", False
                trained = segment.trained
            if not segment.control:
                text += segment.text
                swallow = False
                continue
            position = 0
            for match in self._control_pattern.finditer(segment.text):
                token = self._control[match.group()]
                literal = segment.text[position : match.start()]
                literal = literal.lstrip() if swallow else literal
                text += literal.rstrip() if token.lstrip else literal
                if text:
                    pieces.append((text, starts, trained))
                pieces.append((token.id, True, trained))
                text, starts = "", True
                position, swallow = match.end(), token.rstrip
            literal = segment.text[position:]
            text += literal.lstrip() if swallow else literal
        if text:
            pieces.append((text, starts, trained))
        return pieces

    def _assemble(
        self, pieces: Sequence["_Piece"], encode: Callable[[str, bool], list[int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of all pieces, and the trained spans."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for what, starts, trained in pieces:
            before = len(ids)
            if isinstance(what, str):
                ids += encode(what, starts)
            else:
                ids.append(what)
            if trained and spans and spans[-1][1] == before:
                spans[-1] = (spans[-1][0], len(ids))
            elif trained:
                spans.append((before, len(ids)))
        return ids, spans

    def _encode_text(self, text: str, starts: bool) -> list[int]:
        tokenizer = self._start if starts else self._continue
        with library_errors(self._file):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def _check_copied(self) -> None:
        """Refuses files that `save` will copy and should not: now, not at the end of a run."""
        for name in TOKENIZER_FILES:
            file = own_file(self.folder / name)
            if file and file.stat().st_size > MAX_FILE_BYTES:
                raise ModelError(f"{file}: has more than the {MAX_FILE_BYTES:,} bytes of any such")

    def _special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and the like by name, as far as the tokenizer has them."""
        found = {}
        saved = _read_if_there(self.folder / "special_tokens_map.json")
        for name in _NAMED_TOKENS:
            token = self.config.get(name) or saved.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and content in self._control:
                found[name] = content
        return found

    def _automatic_bos(self, spec: dict[str, Any]) -> str:
        """The token the tokenizer itself puts in front of a text, or ""."""
        whole = load(spec, self._file)
        with_special = whole.encode("a", add_special_tokens=True).ids
        without = whole.encode("a", add_special_tokens=False).ids
        if len(with_special) <= len(without) or with_special[:1] == without[:1]:
            return ""
        bos = [token.content for token in self._control.values() if token.id == with_special[0]]
        if not bos:
            raise ModelError(
                f"{self._file}: not usable: it puts the token {with_special[0]} in front of a text,"
                " which is none of its added tokens"
            )
        return bos[0]

    def _chat_template(self) -> str | None:
        if file := own_file(self.folder / "chat_template.jinja"):
            return read_text(file, "")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # Several, by name.
            entries = [entry for entry in template if isinstance(entry, dict)]
            template = next(
                (entry.get("template") for entry in entries if entry.get("name") == "default"), None
            )
        return template if isinstance(template, str) else None


# A special token's id, or a text and whether it follows a special token; and whether it is trained.
_Piece = tuple[str | int, bool, bool]


def _without_first(
    spans: list[tuple[int, int]], length: int, train_on_prompt: bool
) -> list[tuple[int, int]]:
    """The spans without the first token: nothing comes before it, so nothing can predict it."""
    if train_on_prompt:
        spans = [(0, length)]
    if spans and spans[0][0] == 0:
        spans = [(1, spans[0][1]), *spans[1:]]
    return [span for span in spans if span[0] < span[1]]


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples in the numbers that are encoded in one call."""
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += sum(len(turn.content) for turn in example.turns)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _without_leading_space(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text that goes on: no space put in front, none stripped."""

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


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path, "") if own_file(path) else {}
