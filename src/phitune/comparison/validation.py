"""Questions with known answers from the rows that a run kept for validation. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError
from phitune.inference.questions import Question, of_example, spread
from phitune.run_rows import Run, find_run, rows_of_run
from phitune.training.rundir import ADAPTER

_REMEDY = "Ask from a file with --questions_file."


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
        SettingsError: the run kept no rows.
        DataError: no adapter has a run, or its rows are not what they were.
    """
    found = [run for path in adapter_paths if (run := find_run(path))]
    if not found:
        named = ", ".join(map(str, adapter_paths))
        raise DataError(
            f"--from_validation: {named} is not in a run directory (there is no config.yaml), and"
            f" only a run knows its validation rows. {_REMEDY}"
        )
    run, *others = {run.path.resolve(): run for run in found}.values()
    tokenizer = TextTokenizer(run.path / ADAPTER)
    prompt_format = tokenizer.prompt_format(run.settings.prompt_format)
    data = rows_of_run(run, tokenizer, prompt_format, remedy=_REMEDY)
    there = len(data.rows)
    examples = data.examples(spread(count, there))
    if any(example.is_completion for example in examples):
        raise DataError(
            f"{run.path}: its rows are texts without questions, there is nothing to ask. {_REMEDY}"
        )
    notes = list(data.notes)
    if count > there:
        notes.append(f"{count} rows were asked for, and the run kept {there} for validation")
    return ValidationQuestions(
        [of_example(example) for example in examples],
        f"{len(examples)} of the {there:,} validation rows of {run.path}",
        (*notes, *_notes(run, others)),
    )


def _notes(run: Run, others: Sequence[Run]) -> list[str]:
    return [
        f"{other.path} was trained with another split or on other data, so it may have been trained"
        " on these rows"
        for other in others
        if not run.same_split(other)
    ]
