"""From the settings of a run to its rows as tokens: read, split, encode, and leave out or refuse
what is too long. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phitune.config import Settings
from phitune.data.dataset import Example, read_examples, split_examples
from phitune.data.prompt import PromptFormat
from phitune.data.tokenizer import TextTokenizer, TokenizedExample
from phitune.errors import MAX_LISTED, DataError, listing

DEFAULT_SAMPLE_PROMPTS = 2


@dataclass(frozen=True)
class PreparedData:
    """The rows of a run as tokens, and the prompts its samples answer."""

    train_rows: list[TokenizedExample]
    validation_rows: list[TokenizedExample]
    sample_prompts: list[str]
    warnings: list[str]


def prepare_data(
    settings: Settings, dataset_path: Path, tokenizer: TextTokenizer, prompt_format: PromptFormat
) -> PreparedData:
    """Reads, checks, splits and tokenises the rows.

    Raises:
        DataError: a file or rows that cannot be used; every problem of a file at once.
    """
    warnings: list[str] = []
    examples = read_examples(dataset_path)
    if settings.validation_path:
        validation = read_examples(settings.validation_path)
        trained_on = {example.prompt for example in examples}
        if both := [row.line for row in validation if row.prompt in trained_on]:
            warnings.append(
                f"{len(both)} rows of {settings.validation_path} have prompts that are trained on"
                f" too (lines {_some(both)})"
            )
    else:
        examples, validation = split_examples(examples, settings.validation_split, settings.seed)

    def encode(examples: Sequence[Example], path: Path) -> list[TokenizedExample]:
        rows = [
            tokenizer.encode_example(
                prompt_format,
                example.prompt,
                example.response,
                line=example.line,
                train_on_prompt=settings.train_on_prompt,
            )
            for example in examples
        ]
        return _fitting(rows, settings, path, warnings)

    train_rows = encode(examples, dataset_path)
    validation_rows = encode(validation, settings.validation_path or dataset_path)
    sample_prompts = settings.sample_prompts or [
        example.prompt for example in (validation or examples)[:DEFAULT_SAMPLE_PROMPTS]
    ]
    return PreparedData(train_rows, validation_rows, sample_prompts, warnings)


def _fitting(
    rows: list[TokenizedExample], settings: Settings, path: Path, warnings: list[str]
) -> list[TokenizedExample]:
    """The rows of at most max_length tokens; a longer one is never cut."""
    too_long = [row for row in rows if len(row.input_ids) > settings.max_length]
    if not too_long:
        return rows
    longest = max(len(row.input_ids) for row in too_long)
    said = (
        f"{path}: {len(too_long)} of {len(rows)} rows are longer than max_length"
        f" {settings.max_length} (the longest has {longest} tokens)"
    )
    if settings.on_too_long == "error" or len(too_long) == len(rows):
        lines = [f"{path}:{row.line}: {len(row.input_ids)} tokens" for row in too_long]
        raise DataError(
            f"{said}:\n{listing(lines)}\n"
            f"Use --max_length {longest}, shorten these rows, or leave them out with"
            " --on_too_long drop."
        )
    warnings.append(f"{said}; dropped, lines {_some([row.line for row in too_long])}")
    return [row for row in rows if len(row.input_ids) <= settings.max_length]


def _some(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return ", ".join(map(str, lines[:MAX_LISTED])) + more
