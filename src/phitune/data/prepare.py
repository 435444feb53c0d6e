"""The data of a run: rows as tokens, split into training and validation, and its sample prompts.

Reads the data sets that the settings name (dataset.py), encodes them or finds their tokens in the
cache (store.py), splits off validation rows so that no question is on both sides, and drops, cuts
or refuses rows that are longer than max_length. Only plain texts are cut, and after the split, so
that all pieces of one are on one side; answers are never truncated. A few bytes of each row are in
memory, its tokens stay on disk. No torch here, and numpy only once data is prepared.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phitune.config import Settings
from phitune.data.coder import Coder
from phitune.data.conversation import Example, Turn
from phitune.data.prompt import Segment
from phitune.data.sources import hub_id
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import MAX_LISTED, DataError, listing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phitune.data.mix import Mixed, MixedRows
    from phitune.data.store import Progress, TokenizedData, TokenRows, TokenStore

DEFAULT_SAMPLE_PROMPTS = 2
_FIRST_WORDS = 8  # words of a completion that its sample continues
_PIECE = 2**20  # bytes of a file that are read at once
_MASK_64 = 2**64 - 1


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt that is answered after every epoch."""

    text: str  # as shown
    ids: list[int]


@dataclass(frozen=True)
class PreparedData:
    """The rows of a run as tokens, and the prompts its samples answer."""

    train_rows: "TokenRows | MixedRows"
    validation_rows: "TokenRows"
    sample_prompts: list[SamplePrompt]
    notes: list[str]  # which files were read, and as which format
    warnings: list[str]
    mixed: "tuple[Mixed, ...]" = ()  # of other data sets, which are among the training rows

    @property
    def own_rows(self) -> "TokenRows":
        """The training rows of the main data."""
        from phitune.data.mix import MixedRows

        rows = self.train_rows
        return rows.main if isinstance(rows, MixedRows) else rows


@dataclass
class _Remarks:
    """What the user is told about the data, in the order in which it is found."""

    notes: list[str]
    warnings: list[str]


def prepare_data(
    settings: Settings,
    dataset_path: Path,
    coder: Coder,
    progress: "Progress | None" = None,
) -> PreparedData:
    """Reads, checks, tokenises and splits the rows.

    Raises:
        DataError: data or rows that cannot be used; every problem of a data set at once.
    """
    # Imported late, with numpy: `phitune plan` without a data set does not need them.
    import numpy as np

    from phitune.data.mix import MixedRows
    from phitune.data.store import TokenRows, tokenized

    # Read, check, encode; split.
    data = tokenized(dataset_path, "train", settings, coder, progress)
    remarks = _Remarks([*data.notes], [*data.warnings])
    held_out, validation_path = data, settings.validation_path or dataset_path
    if settings.validation_path:
        held_out = tokenized(validation_path, "validation", settings, coder, progress)
        remarks.notes += held_out.notes
        remarks.warnings += held_out.warnings
        if shared := _shared_questions(data.store, held_out.store):
            lines = [_line(held_out.store.place(row)) for row in shared[:MAX_LISTED]]
            remarks.warnings.append(
                f"{len(shared)} rows of {validation_path} have prompts that are trained on"
                f" too (lines {_some(lines, len(shared))})"
            )
        train = np.arange(data.store.rows, dtype=np.uint32)
        validation = np.arange(held_out.store.rows, dtype=np.uint32)
    else:
        try:
            train, validation = split_rows(data.store, settings.validation_split, settings.seed)
        except DataError as error:  # Rows that are left out may be why.
            raise DataError("\n".join([str(error), *remarks.warnings])) from None

    # Drop or refuse rows that are too long.
    train_rows = _fitting(TokenRows(data.store, train), settings, dataset_path, remarks)
    validation_rows = _fitting(
        TokenRows(held_out.store, validation), settings, validation_path, remarks
    )

    # Other data sets, of which each epoch takes some rows.
    mixed = _mixed(settings, len(train_rows), validation_rows, coder, progress, remarks)

    # What samples answer: the given prompts, or the first rows.
    prompts = _given_prompts(settings.sample_prompts, data, coder)
    if not prompts:
        rows, path = train_rows, dataset_path
        if len(validation_rows):
            rows, path = validation_rows, validation_path
        prompts = _first_prompts(rows, path, settings, coder)
    all_rows = MixedRows(train_rows, mixed) if mixed else train_rows
    return PreparedData(all_rows, validation_rows, prompts, remarks.notes, remarks.warnings, mixed)


def _mixed(
    settings: Settings,
    main_rows: int,
    validation_rows: "TokenRows",
    coder: Coder,
    progress: "Progress | None",
    remarks: _Remarks,
) -> "tuple[Mixed, ...]":
    """The other data sets of `mix`, without rows whose question is validated with.

    Raises:
        DataError: one of them cannot be used.
    """
    if not settings.mixed:
        return ()
    import numpy as np

    from phitune.data.mix import Mixed, taken_rows
    from phitune.data.store import TokenRows, tokenized

    held_out = np.concatenate([np.empty(0, np.uint64), *validation_rows.store.questions()])
    held_out = held_out[validation_rows.indices]
    counts = taken_rows(main_rows, [share for _, share in settings.mixed])
    found = []
    for (path, share), taken in zip(settings.mixed, counts, strict=True):
        own = settings.of_mixed(path)
        data = tokenized(path, "train", own, coder, progress)
        remarks.notes += data.notes
        remarks.warnings += data.warnings
        questions = np.concatenate(list(data.store.questions()))
        trainable = np.flatnonzero(~np.isin(questions, held_out)).astype(np.uint32)
        if left_out := len(questions) - len(trainable):
            remarks.notes.append(
                f"mix {path}: {left_out} of {len(questions)} rows are left out, since their prompts"
                " are among the validation rows"
            )
        if not len(trainable):
            raise DataError(f"mix {path}: no row is left to train on")
        rows = _fitting(TokenRows(data.store, trainable), own, path, remarks)
        if taken > len(rows):
            remarks.notes.append(
                f"mix {path}: an epoch takes {taken} rows, more than the {len(rows)} that there"
                " are, so some come several times"
            )
        found.append(Mixed(path, share, rows, taken))
    remarks.notes.append("mix: validation is on rows of the main data alone")
    return tuple(found)


def facts_of(data: PreparedData) -> dict[str, Any]:
    """What a run records of its data: numbers of rows and tokens, and a hash of each file."""
    parts = (data.own_rows, data.validation_rows, *(mixed.rows for mixed in data.mixed))
    files = list(dict.fromkeys(path for rows in parts for path in rows.store.sources))
    names = [path.name for path in files]
    mixed = [
        {
            "name": str(part.path) if hub_id(part.path) else part.path.name,
            "share": part.share,
            "rows": len(part.rows),
            "rows_of_an_epoch": part.taken,
        }
        for part in data.mixed
    ]
    own = data.own_rows
    return {
        "training_rows": len(own),
        "conversations": int(own.store.have_several_questions(own.indices).sum()),
        "training_tokens": data.train_rows.num_tokens,
        "trained_tokens": data.train_rows.num_target_tokens,
        "validation_rows": len(data.validation_rows),
        **({"mix": mixed} if mixed else {}),
        "files": {
            (path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}"): (
                _sha256(path)
            )
            for path in files
        },
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def split_rows(
    store: "TokenStore", validation_split: float, seed: int
) -> "tuple[NDArray[np.uint32], NDArray[np.uint32]]":
    """A seeded split: indices of the training rows and of the validation rows, in order. [rows]

    Raises:
        DataError: the training side would be empty.
    """
    import numpy as np

    rows = np.arange(store.rows, dtype=np.uint32)
    if validation_split == 0:
        return rows, rows[:0]
    chosen = validation_rows(store.questions(), validation_split, seed)
    return rows[~chosen], rows[chosen]


def validation_rows(
    questions: "Iterable[NDArray[np.uint64]]", validation_split: float, seed: int
) -> "NDArray[np.bool_]":
    """Which rows validate, by the hashes of their questions. [rows]

    Each question has a place between 0 and 2**32 that depends on its text and the seed alone; the
    rows with the lowest places are for validation. So rows with the same question stay together,
    and few rows change sides when a data set grows.

    Args:
        questions: the hashes of all rows, in one piece or several. [rows]
        validation_split: more than 0.

    Raises:
        DataError: the training side would be empty.
    """
    import numpy as np

    places = np.concatenate([_scattered(part, seed) for part in questions])
    wanted = math.ceil(validation_split * len(places))
    last = np.partition(places, wanted - 1)[wanted - 1]
    chosen: NDArray[np.bool_] = places <= last
    if chosen.all():
        raise DataError(
            f"validation_split {validation_split:g} of {len(places)} rows with"
            f" {len(np.unique(places))} different prompts leaves nothing to train on; add rows or"
            " use --validation_split 0"
        )
    return chosen


def _scattered(hashes: "NDArray[np.uint64]", seed: int) -> "NDArray[np.uint32]":
    """The upper half of splitmix64 of each hash, from a start that depends on the seed. [rows]

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    import numpy as np

    mixed = hashes ^ np.uint64(seed * 0x9E3779B97F4A7C15 & _MASK_64)
    mixed += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    upper: NDArray[np.uint32] = (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)
    return upper.astype(np.uint32)


def _shared_questions(train: "TokenStore", validation: "TokenStore") -> list[int]:
    """Rows of the validation data whose question is also in the training data."""
    import numpy as np

    known = np.concatenate(list(train.questions()))
    known.sort()
    shared: list[int] = []
    before = 0  # rows of the parts before
    for part in validation.questions():
        at = np.minimum(np.searchsorted(known, part), len(known) - 1)
        shared += (before + np.flatnonzero(known[at] == part)).tolist()
        before += len(part)
    return shared


def _fitting(rows: "TokenRows", settings: Settings, path: Path, remarks: _Remarks) -> "TokenRows":
    """The rows of at most max_length tokens, with texts cut into such if the settings say so.

    Args:
        remarks: gets a line where texts were cut, and one where rows were dropped.
    """
    import numpy as np

    from phitune.data.pieces import cut
    from phitune.data.store import TokenRows

    lengths, count = rows.lengths(), len(rows)
    if settings.on_too_long == "split":
        texts = rows.store.are_texts(rows.indices) & (lengths > settings.max_length)
        if number := int(texts.sum()):
            longest = int(lengths[texts].max())
            row, cuts = cut(lengths, settings.max_length, texts)
            rows = TokenRows(rows.store, rows.indices[row], cuts)
            lengths = rows.lengths()
            remarks.notes.append(
                f"{path}: {number} of {count} rows are texts longer than max_length"
                f" {settings.max_length} (the longest has {longest:,} tokens); cut into"
                f" {len(rows) - count + number:,} pieces"
            )
    too_long = np.flatnonzero(lengths > settings.max_length)
    if not len(too_long):
        return rows
    longest, row_of_longest = int(lengths.max()), int(rows.indices[lengths.argmax()])
    not_encoded = rows.store.not_encoded
    at_least = "at least " if row_of_longest in not_encoded else ""
    problem = (
        f"{path}: {len(too_long)} of {count} rows are longer than max_length"
        f" {settings.max_length} (the longest has {at_least}{longest} tokens)"
    )
    places = [rows.place(int(index)) for index in too_long[:MAX_LISTED]]
    if settings.on_too_long == "error" or len(too_long) == len(rows):
        lines = [
            f"{place}: {'at least ' * (rows.indices[index] in not_encoded)}{lengths[index]} tokens"
            for place, index in zip(places, too_long, strict=False)
        ]
        has_texts = rows.store.are_texts(rows.indices[too_long]).any()
        remedy = " Plain texts can be cut into pieces: --on_too_long split." if has_texts else ""
        use = "S" if at_least else f"Use --max_length {longest}, s"
        if len(too_long) > MAX_LISTED:
            lines.append(f"... and {len(too_long) - MAX_LISTED} more")
        raise DataError(
            f"{problem}:\n{listing(lines, MAX_LISTED + 1)}\n"
            f"{use}horten these rows, or leave them out with --on_too_long drop.{remedy}"
        )
    why = ", since answers are never cut" if settings.on_too_long == "split" else ""
    shown = _some([*map(_line, places)], len(too_long))
    remarks.warnings.append(f"{problem}; dropped{why}, lines {shown}")
    kept = lengths <= settings.max_length
    return TokenRows(rows.store, rows.indices[kept], rows.cuts and rows.cuts.only(kept))


def _given_prompts(
    texts: Sequence[str],
    data: "TokenizedData",
    coder: Coder,
) -> list[SamplePrompt]:
    """The prompts of the settings: questions, or the beginnings of completions."""
    if data.is_completion:
        return [_beginning(text, coder.tokenizer) for text in texts]
    return [SamplePrompt(text, coder.encode((Turn("user", text),))) for text in texts]


def _first_prompts(
    rows: "TokenRows",
    path: Path,
    settings: Settings,
    coder: Coder,
) -> list[SamplePrompt]:
    """The last questions of the first rows. Their text is read again: the store has only tokens."""
    from phitune.data.store import open_stream

    wanted = rows.first_rows(DEFAULT_SAMPLE_PROMPTS)
    if not wanted:
        return []
    part: Any = "validation" if path == settings.validation_path else "train"
    stream = iter(open_stream(path, part, settings, coder.prompt_format))
    examples = [
        example
        for index, example in enumerate(itertools.islice(stream, wanted[-1] + 1))
        if index in wanted
    ]
    return [_asked(example, coder) for example in examples]


def _asked(example: Example, coder: Coder) -> SamplePrompt:
    if example.is_completion:
        words = example.turns[0].content.split(" ")
        count = min(_FIRST_WORDS, max(1, len(words) // 2))
        return _beginning(" ".join(words[:count]), coder.tokenizer)
    turns = example.turns[:-1]
    text = turns[0].content if len(turns) == 1 else coder.text(turns)
    return SamplePrompt(text, coder.encode(turns))


def _beginning(text: str, tokenizer: TextTokenizer) -> SamplePrompt:
    bos = [Segment(tokenizer.bos_token, control=True)] if tokenizer.bos_token else []
    return SamplePrompt(text, tokenizer.encode([*bos, Segment(text, trained=True)]))


def _line(place: str) -> str:
    return place.rpartition(":")[2]


def _some(lines: Sequence[str], count: int) -> str:
    more = f" and {count - MAX_LISTED} more" if count > MAX_LISTED else ""
    return ", ".join(lines[:MAX_LISTED]) + more
