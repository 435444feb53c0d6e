"""Questions with known answers from the rows that a run kept for validation. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phitune.comparison.finished_run import FinishedRun, open_run, run_directory
from phitune.errors import DataError
from phitune.inference.questions import Question, of_example, picked, spread


@dataclass(frozen=True)
class ValidationQuestions:
    """What is asked, and what is to be said about it."""

    questions: list[Question]
    source: str
    notes: tuple[str, ...]


def validation_questions(adapter_paths: Sequence[Path], count: int) -> ValidationQuestions:
    """Rows from the validation split of the first of the adapters that came out of a run.

    They are taken from all over the split, in their order. What is asked is the last question of a
    row, with the turns before it.

    Raises:
        DataError: no adapter has a run, or its rows are not what they were.
    """
    folders = [folder for path in adapter_paths if (folder := run_directory(path))]
    if not folders:
        named = ", ".join(map(str, adapter_paths))
        raise DataError(
            f"--from_validation: {named} is not in a run directory (there is no config.yaml), and"
            " only a run knows its validation rows; ask from a file with --questions_file"
        )
    run, *others = [open_run(folder) for folder in dict.fromkeys(folders)]
    rows = run.validation_rows()
    wanted = [int(rows.indices[index]) for index in spread(count, len(rows))]
    examples = picked(run.examples(), wanted)
    if any(example.is_completion for example in examples):
        raise DataError(
            f"{run.path}: its rows are texts without questions, there is nothing to ask; ask from a"
            " file with --questions_file"
        )
    return ValidationQuestions(
        [of_example(example) for example in examples],
        f"{len(examples)} of the {len(rows):,} validation rows of {run.path}",
        tuple(_notes(run, others, count, len(rows))),
    )


def _notes(run: FinishedRun, others: Sequence[FinishedRun], count: int, there: int) -> list[str]:
    notes = []
    if count > there:
        notes.append(f"{count} rows were asked for, and the run kept {there} for validation")
    if newer := run.newer_data():
        notes.append(
            f"{newer} was written after the run began; its training rows have as many tokens as"
            " then, its validation rows may be others"
        )
    notes += [
        f"{other.path} was trained with another split or on other data, so it may have been trained"
        " on these rows"
        for other in others
        if not run.same_split(other)
    ]
    return notes
