"""metrics.jsonl as curves: few points for a chart, however many lines there are, and what is new.

A file is read once, as it grows, in pieces. Lines are gathered into bins of neighbouring steps;
where there are too many bins two become one, so memory does not grow with the file. A line that is
no object, or longer than any that a run writes, is counted and skipped.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from phitune.text import plural, visible
from phitune.ui.files import open_file

TRAIN = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "memory_gib",
    "checkpoint_seconds",
)
BANDS = ("loss", "grad_norm")  # whose smallest and largest value of a bin is kept, too
MOST_BINS = 1000
_RECENT = 2000  # points that are told one by one
_MOST_EVALUATIONS, _MOST_INCIDENTS = 5000, 200
_LONGEST_LINE, _USUAL_LINE = 2**16, 2**11  # bytes
_PIECE = 2**17  # bytes; what is made of them fits in a processor's cache
_CHECKED = 64  # bytes before the place where reading goes on, which must be what they were

Columns = dict[str, list[Any]]
Line = Mapping[str, Any]  # an object of metrics.jsonl


@dataclass(frozen=True)
class Incident:
    """Something in a run that a person should see."""

    step: int | None
    kind: str
    text: str


@dataclass
class _Bin:
    """Neighbouring steps."""

    count: int = 0
    step: int = 0  # of the last one, as epoch, tokens and time
    epoch: int | None = None
    tokens: int = 0  # of all steps so far
    time: float | None = None
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)

    def take(self, other: "_Bin") -> None:
        """Adds the steps behind these."""
        self.count += other.count
        self.step, self.epoch, self.tokens = other.step, other.epoch, other.tokens
        self.time = other.time
        for name in other.sums:
            self.sums[name] = self.sums.get(name, 0.0) + other.sums[name]
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]
            if name in BANDS:
                self.least[name] = min(self.least.get(name, math.inf), other.least[name])
                self.most[name] = max(self.most.get(name, -math.inf), other.most[name])

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if name in self.sums else None


def _bins_of(
    steps: Sequence[Line], ends: Sequence[int], tokens_before: int, names: Sequence[str]
) -> list[_Bin]:
    """The lines of steps as bins of the values of some names, each up to one of `ends`.

    Column by column: the lines are many, and the bins few.
    """
    bins, first, tokens = [], 0, tokens_before
    counted = _column(steps, "tokens")
    for end in ends:
        last = steps[end - 1]
        epoch = last.get("epoch")
        tokens += int(_sum_of(counted[first:end])[1])
        one = _Bin(end - first, last["step"], epoch if type(epoch) is int else None, tokens)
        one.time = _real(last.get("time"))
        bins.append(one)
        first = end
    for name in names:
        column = _column(steps, name)
        first = 0
        for one, end in zip(bins, ends, strict=True):
            values = column[first:end]
            first = end
            count, total = _sum_of(values)
            if count:
                one.sums[name], one.counts[name] = total, count
                if name in BANDS:
                    numbers: list[float] = values if count == len(values) else _reals(values)
                    one.least[name], one.most[name] = min(numbers), max(numbers)
    return bins


def _column(lines: Sequence[Line], name: str) -> list[Any]:
    """The values of one name; None where a line has none. Nearly always all have one."""
    try:
        return list(map(itemgetter(name), lines))  # half the time of asking each line
    except KeyError:
        return [line.get(name) for line in lines]


def _sum_of(values: list[Any]) -> tuple[int, float]:
    """How many numbers there are, and their sum. Nearly always all are numbers."""
    try:
        total = sum(values)
        if math.isfinite(total):
            return len(values), total
    except (TypeError, OverflowError):  # texts, or numbers of hundreds of digits
        pass
    numbers = _reals(values)
    return len(numbers), sum(numbers)


def _reals(values: list[Any]) -> list[float]:
    return [value for value in values if _real(value) is not None]


class Curves:
    """The curves of one metrics.jsonl; `read` takes over what is new in it."""

    def __init__(self, path: Path, names: tuple[str, ...] = TRAIN) -> None:
        """
        Args:
            names: of the curves that are wanted; each one takes its time.
        """
        self.path, self._names = path, names
        self._clear()

    def _clear(self) -> None:
        self._offset = 0
        self._before = b""  # the bytes before the offset, as far as they are checked
        self._inode = 0
        self._skipping = False  # inside a line that is too long
        self._tokens = 0
        self._size = 0  # of the file
        self._width = 0  # steps of a bin; not known before lines are
        self._bins: list[_Bin] = []
        self._evaluations: list[Line] = []
        self._incidents: list[Incident] = []
        # The last lines, and where each ends.
        self._recent: deque[tuple[int, Line | Incident]] = deque(maxlen=_RECENT)
        self._unreadable = 0
        self._generation = os.urandom(4).hex()

    # --- reading --------------------------------------------------------------------------------

    def read(self) -> None:
        """Takes over the lines that were written since; all of them if the file is another one."""
        try:
            with open_file(self.path) as file:
                found = os.fstat(file.fileno())
                file.seek(max(0, self._offset - _CHECKED))
                before = file.read(min(_CHECKED, self._offset))
                if self._offset and (
                    found.st_ino != self._inode
                    or found.st_size < self._offset
                    or before != self._before
                ):
                    self._clear()
                self._inode = found.st_ino
                self._size = found.st_size
                file.seek(self._offset)
                while piece := file.read(_PIECE):
                    if not self._take(piece):
                        break
                    file.seek(self._offset)
        except OSError:
            if self._offset:  # It is gone.
                self._clear()

    def _take(self, piece: bytes) -> bool:
        """The whole lines of a piece; False where it has none, and there is nothing to skip."""
        end = piece.rfind(b"\n") + 1
        if not end:
            if len(piece) < _LONGEST_LINE and not self._skipping:
                return False  # It is still being written.
            self._skipping = True
            self._move(piece)
            return True
        lines = piece[: end - 1].split(b"\n")
        # If the file goes on as here, the bins are as wide now as they will be in the end.
        self._width = self._width or 1 + self._size * len(lines) // (len(piece) * MOST_BINS)
        first = self._offset
        if self._skipping:
            first += len(lines[0]) + 1
            lines, self._skipping = lines[1:], False
            self._bad(first)
        found = _objects(lines)
        steps = [line for line in found if line is not None and "loss" in line]
        if len(steps) == len(found):
            ends = _ends(lines[-_RECENT:], self._offset + end)
            self._recent.extend(zip(ends, steps[-_RECENT:], strict=True))
        else:
            self._one_by_one(lines, found, _ends(lines, self._offset + end))
        self._gather(steps)
        self._move(piece[:end])
        return True

    def _one_by_one(
        self, lines: Sequence[bytes], found: Sequence[Line | None], ends: Iterable[int]
    ) -> None:
        """Sorts lines that are not all steps; the steps themselves are gathered by others."""
        for text, line, end in zip(lines, found, ends, strict=True):
            if line is None:
                if text.strip():
                    self._bad(end)
            elif "loss" in line:
                self._recent.append((end, line))
            elif "validation_loss" in line:
                if len(self._evaluations) < _MOST_EVALUATIONS:
                    self._evaluations.append(line)
                self._recent.append((end, line))
            elif incident := _incident(line["step"], line):
                self._add(incident, end)

    def _move(self, passed: bytes) -> None:
        self._offset += len(passed)
        self._before = (self._before + passed[-_CHECKED:])[-_CHECKED:]

    def _bad(self, offset: int) -> None:
        self._unreadable += 1
        said = f"{plural(self._unreadable, 'line')} of metrics.jsonl cannot be read"
        self._incidents = [each for each in self._incidents if each.kind != "unreadable"]
        self._add(Incident(None, "unreadable", said), offset)

    def _add(self, incident: Incident, offset: int) -> None:
        if len(self._incidents) < _MOST_INCIDENTS:
            self._incidents.append(incident)
        self._recent.append((offset, incident))

    def _gather(self, steps: Sequence[Line]) -> None:
        """Puts steps into bins of `_width` of them."""
        if not steps:
            return
        room = self._width - self._bins[-1].count if self._bins else 0
        ends = [*range(room or self._width, len(steps), self._width), len(steps)]
        new = _bins_of(steps, ends, self._tokens, self._names)
        self._tokens = new[-1].tokens
        if room:
            self._bins[-1].take(new.pop(0))
        self._bins += new
        while len(self._bins) > MOST_BINS:
            self._bins, self._width = _merged(self._bins, 2), 2 * self._width

    # --- what is told ---------------------------------------------------------------------------

    @property
    def mark(self) -> str:
        """Where a reader is that has all of it."""
        return f"{self._generation}-{self._offset}"

    def history(self, points: int) -> dict[str, Any]:
        """All of it, in at most that number of points."""
        bins = _merged(self._bins, math.ceil(len(self._bins) / points))
        return {
            "offset": self.mark,
            "train": _columns(bins, self._names),
            "validation": self._validation(self._evaluations),
            "incidents": [vars(each) for each in self._incidents],
        }

    def tail(self, mark: str) -> dict[str, Any]:
        """What came behind a mark, line by line; `restarted`: all has to be asked for again."""
        generation, _, text = mark.partition("-")
        first = self._recent[0][0] if len(self._recent) == _RECENT else 0
        offset = int(text) if text.isdecimal() and len(text) < 20 else -1
        restarted = generation != self._generation or offset < first or offset > self._offset
        new = [] if restarted else [what for end, what in self._recent if end > offset]
        incidents = [each for each in new if isinstance(each, Incident)]
        lines = [each for each in new if not isinstance(each, Incident)]
        steps = [line for line in lines if "loss" in line]
        tokens = self._tokens - int(_sum_of([line.get("tokens") for line in steps])[1])
        bins = _bins_of(steps, range(1, len(steps) + 1), tokens, self._names)
        return {
            "offset": self.mark,
            "restarted": restarted,
            "train": _columns(bins, self._names),
            "validation": self._validation([line for line in lines if "loss" not in line]),
            "incidents": [vars(each) for each in incidents],
        }

    def _validation(self, lines: Sequence[Line]) -> Columns:
        tokens = _tokens_at(self._bins, [line["step"] for line in lines])
        return {
            "step": [line["step"] for line in lines],
            "epoch": [_real(line.get("epoch")) for line in lines],
            "tokens": tokens,
            "time": [_real(line.get("time")) for line in lines],
            "loss": [_real(line.get("validation_loss")) for line in lines],
        }


def _ends(lines: Sequence[bytes], end: int) -> list[int]:
    """Where each of some lines ends in the file, the last one at `end`."""
    start = end - sum(map(len, lines)) - len(lines)
    return list(itertools.accumulate((len(line) + 1 for line in lines), initial=start))[1:]


def _objects(lines: Sequence[bytes]) -> Sequence[dict[str, Any] | None]:
    """What stands in lines: an object with the number of its step, else None."""
    # All at once where all are sound, as they nearly always are: it takes a third less time.
    if lines and max(map(len, lines)) <= _USUAL_LINE and all(lines):
        try:
            found = from_json(b"[" + b",".join(lines) + b"]", allow_inf_nan=False, **_CACHED)
        except ValueError:
            found = []
        if len(found) == len(lines) and set(map(type, found)) == {dict}:
            steps = _column(found, "step")
            if set(map(type, steps)) == {int} and min(steps) >= 0 and max(steps) < 2**53:
                return found  # type: ignore[no-any-return]
    return [_object(line) for line in lines]


def _object(line: bytes) -> dict[str, Any] | None:
    if len(line) > _LONGEST_LINE:
        return None
    try:
        found = from_json(line, allow_inf_nan=False, **_CACHED)
    except ValueError:
        return None
    if not _is_sound(found):
        return None
    # Lines are kept for a while, with nothing that is not shown.
    return found if len(line) <= _USUAL_LINE else {key: found[key] for key in _KEPT if key in found}


_CACHED: dict[str, Any] = {"cache_strings": "keys"}
_KEPT = (
    *("step", "epoch", "tokens", "time", "validation_loss", *TRAIN),
    *("loss_spike", "not_finite", "out_of_memory", "rows", "micro_batch", "recompute_layers"),
)


def _is_sound(found: object) -> bool:
    return type(found) is dict and type(found.get("step")) is int and 0 <= found["step"] < 2**53


def _incident(step: int, found: Line) -> Incident | None:
    rows = found.get("rows")
    where = ""
    if isinstance(rows, list) and rows:
        named = ", ".join(visible(str(row)[:80]) for row in rows[:3])
        where = f"; rows {named}" + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
    if isinstance(spike := found.get("loss_spike"), dict):
        loss, usual = _real(spike.get("loss")), _real(spike.get("usual"))
        said = f"loss {loss:.4g}, usually {usual:.4g}" if loss and usual else "a loss spike"
        return Incident(step, "loss spike", said + where)
    if isinstance(bad := found.get("not_finite"), dict):
        said = ", ".join(f"{visible(str(k)[:20])} {visible(str(v)[:20])}" for k, v in bad.items())
        return Incident(step, "not finite", said + where)
    if "out_of_memory" in found:
        split = {name: found.get(name) for name in ("micro_batch", "recompute_layers")}
        said = visible(str(found["out_of_memory"])[:300])
        now = f"; from here on {split['micro_batch']} rows per micro-batch"
        return Incident(step, "out of memory", said + now)
    return None


def _real(value: object) -> float | None:
    if type(value) is int or type(value) is float:
        return value if abs(value) < 1e300 else None  # None of NaN, too
    return None


def _merged(bins: list[_Bin], count: int) -> list[_Bin]:
    """Each `count` neighbours as one."""
    if count <= 1:
        return bins
    merged = []
    for first in range(0, len(bins), count):
        one = _Bin()
        for each in bins[first : first + count]:
            one.take(each)
        merged.append(one)
    return merged


def _columns(bins: Sequence[_Bin], names: Sequence[str]) -> Columns:
    columns: Columns = {
        "step": [each.step for each in bins],
        "epoch": [each.epoch for each in bins],
        "tokens": [each.tokens for each in bins],
        "time": [each.time for each in bins],
    }
    for name in names:
        columns[name] = [_rounded(each.mean(name)) for each in bins]
        if name in BANDS:
            columns[f"{name}_min"] = [_rounded(each.least.get(name)) for each in bins]
            columns[f"{name}_max"] = [_rounded(each.most.get(name)) for each in bins]
    return columns


def _rounded(value: float | None) -> float | None:
    """Six digits are more than a chart shows."""
    return None if value is None else float(f"{value:.6g}")


def _tokens_at(bins: Sequence[_Bin], steps: Iterable[int]) -> list[int]:
    """The tokens that were trained on by some steps; both in order of steps."""
    found, at, tokens = [], 0, 0
    for step in steps:
        while at < len(bins) and bins[at].step <= step:
            tokens = bins[at].tokens
            at += 1
        found.append(tokens)
    return found


class AllCurves:
    """The curves of the runs that were looked at last."""

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._known: dict[tuple[Path, tuple[str, ...]], Curves] = {}

    def of(self, path: Path, names: tuple[str, ...] = TRAIN) -> Curves:
        """The curves of a file with these names, as it is now."""
        curves = self._known.pop((path, names), None) or Curves(path, names)
        self._known[path, names] = curves  # the last one is the latest
        while len(self._known) > self._most:
            del self._known[next(iter(self._known))]
        curves.read()
        return curves
