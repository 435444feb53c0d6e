"""Sentences about answers that both the terminal and the page say."""

from collections.abc import Sequence
from dataclasses import dataclass

from phitune.inference.compare import Cell, Column, Comparison, Summary
from phitune.inference.sampling import Sampling
from phitune.inference.scores import NORMALISATION


@dataclass(frozen=True)
class Asked:
    """How the answers came about, for people and for the record."""

    model_name: str
    source: str  # where the questions are from
    max_new_tokens: int
    sampling: Sampling
    notes: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        of = self.sampling
        said = [f"up to {self.max_new_tokens:,} tokens"]
        if of.temperature == 0:
            said.append("the most probable token each time")
        else:
            said.append(f"drawn with temperature {of.temperature:g}, seed {of.seed}")
            if of.top_p < 1:
                said.append(f"top_p {of.top_p:g}")
            if of.top_k:
                said.append(f"top_k {of.top_k}")
        if of.repetition_penalty != 1:
            said.append(f"repetition_penalty {of.repetition_penalty:g}")
        return ", ".join(said)


MATCH = f"match: {NORMALISATION}."
NLL = (
    "nll: the negative log-likelihood of the expected answer, end token included; less is more"
    " probable."
)


def column_line(column: Column, model_name: str) -> str:
    return f"{column.path or model_name}, asked in the {column.prompt_format} format"


def notes_of(cell: Cell) -> list[str]:
    """What is to be said of an answer, a line each."""
    tokens = f"{cell.tokens:,} token{'' if cell.tokens == 1 else 's'}"
    notes = [f"{tokens}, {'stopped' if cell.stopped else 'did not stop by itself'}"]
    if cell.exact is not None:
        notes.append("exact" if cell.exact else "match" if cell.match else "no match")
        if cell.likelihood:
            notes.append(f"nll {cell.likelihood.nll:.2f}, {cell.likelihood.per_token:.3f} a token")
        else:
            notes.append("nll unknown: longer than the model's positions")
    return notes


def summary_notes(comparison: Comparison, column: int) -> list[str]:
    """A column's summary, a line each."""
    summary = comparison.summary(column)
    notes = [
        f"stopped {summary.stopped} of {summary.questions} ({_share(summary.stopped, summary)})",
        f"{summary.mean_tokens:,.1f} tokens on average",
    ]
    if summary.expected:
        notes.append(
            f"exact {summary.exact} of {summary.expected}, match {summary.matches} of"
            f" {summary.expected}"
        )
    if summary.mean_nll is not None:
        notes.append(f"nll {summary.mean_nll:.2f} an answer, {summary.nll_per_token:.3f} a token")
    if column:
        notes.append(differs_line(summary))
    return notes


def differs_line(summary: Summary) -> str:
    count = len(summary.differs)
    if not count:
        return "answers nothing otherwise than the base"
    which = "" if count == summary.questions else f": {ranges(summary.differs)}"
    return f"differs from the base in {count} of {summary.questions}{which}"


def ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _share(count: int, summary: Summary) -> str:
    return f"{count / summary.questions:.0%}" if summary.questions else "none"
