"""What models are asked, and what they should answer: from a file, or from a run's validation rows.

A questions file is YAML: `questions`, a list of texts or of `question` with what belongs to it, and
optionally a `system` for all of them. What is written there is a text, whatever YAML would make of
it: `expected: 15` is the answer "15". No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from phitune.data.coder import Coder
from phitune.data.conversation import Example, Turn
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError, listing
from phitune.inference.run_rows import Run, find_run, rows_of_run
from phitune.neighbours import unknown_name
from phitune.text import plural, short_path
from phitune.training.rundir import ADAPTER

_KEYS = ("questions", "system")
_KEYS_OF_A_QUESTION = ("question", "expected", "system")
_NULL = ("~", "null", "Null", "NULL")  # as YAML writes nothing, where it is not quoted


@dataclass(frozen=True)
class Question:
    """Turns that end with a user's, and the answer that is known, if one is."""

    turns: tuple[Turn, ...]
    expected: str | None = None
    place: str = ""  # file:line

    @property
    def text(self) -> str:
        """For people: the question alone, or the conversation that leads to it."""
        if len(self.turns) == 1:
            return self.turns[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in self.turns)


def ask(text: str, system: str | None = None) -> Question:
    """A question that a person typed."""
    return Question(_turns(text, system))


def of_example(example: Example) -> Question:
    """The last thing that a row asks, with all that comes before it."""
    place = f"{example.file}:{example.line}"
    return Question(example.turns[:-1], example.turns[-1].content, place)


def spread(count: int, of: int) -> list[int]:
    """So many of `of` places, as far apart as can be: a sorted file is seen from end to end."""
    count = min(count, of)
    return [(2 * index + 1) * of // (2 * count) for index in range(count)]


def read_questions(path: Path, system: str | None = None) -> list[Question]:
    """The questions of a file.

    Args:
        system: for questions that come with none of their own.

    Raises:
        DataError: it cannot be read, is not YAML, or is not a file of questions; all that is wrong
            with it at once, with its lines.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"questions_file {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"questions_file {path}: cannot be read as UTF-8 text: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)  # Every scalar stays a text.
    except (yaml.YAMLError, RecursionError) as error:
        line, said = _not_yaml(error, text)
        raise DataError(f"questions_file {path}: {line}is not YAML: {said}") from None
    problems: list[str] = []
    questions = _questions(path, root, system, problems)
    if problems:
        raise DataError(
            f"questions_file {path}:\n{listing(problems)}\n"
            "It needs a list named questions, of texts or of question and expected."
        )
    return questions


def _questions(
    path: Path, root: Node | None, system: str | None, problems: list[str]
) -> list[Question]:
    """The questions of a document, as far as they can be read; problems name their lines."""
    if root is None:
        problems.append("the file is empty")
        return []
    if not isinstance(root, MappingNode):
        problems.append(f"{_line(root)}the file is {_kind(root)}, expected the key questions")
        return []
    keys = _fields(root, _KEYS, problems)
    if "system" in keys:
        system = _text(keys["system"], "system", problems)
    listed = keys.get("questions")
    if not isinstance(listed, SequenceNode) or not listed.value:
        kind = f"questions is {_kind(listed)}, expected a list" if listed else ""
        problems.append(_line(listed or root) + (kind or "there is no key questions"))
        return []
    questions = []
    for number, node in enumerate(listed.value, 1):
        what, fields = f"question {number}", {"question": node}
        if isinstance(node, MappingNode):
            fields = _fields(node, _KEYS_OF_A_QUESTION, problems)
        texts = {
            name: _text(value, what if name == "question" else f"{name} of {what}", problems)
            for name, value in fields.items()
        }
        if "question" not in texts:
            problems.append(f"{_line(node)}{what} has no key question")
        elif question := texts["question"]:
            turns = _turns(question, texts.get("system") or system)
            place = f"{path}:{node.start_mark.line + 1}"
            questions.append(Question(turns, texts.get("expected"), place))
    return questions


def _fields(node: MappingNode, known: Sequence[str], problems: list[str]) -> dict[str, Node]:
    """The values of a mapping by their keys, each known and there once."""
    found: dict[str, Node] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, ScalarNode) else _kind(key)
        if name not in known:
            problems.append(_line(key) + unknown_name(name, known, kind="key"))
        elif name in found:
            problems.append(f"{_line(key)}{name} is there twice")
        else:
            found[name] = value
    return found


def _text(node: Node, what: str, problems: list[str]) -> str | None:
    """A scalar that says something."""
    if not isinstance(node, ScalarNode):
        problems.append(f"{_line(node)}{what} is {_kind(node)}, expected a text")
        return None
    text: str = node.value
    is_null = node.style is None and text in _NULL
    if is_null or not text.strip():
        problems.append(f"{_line(node)}{what} is empty")
    elif any("\ud800" <= letter <= "\udfff" for letter in text):
        problems.append(f"{_line(node)}{what} has half a surrogate pair")
    else:
        return text
    return None


def _line(node: Node) -> str:
    return f"line {node.start_mark.line + 1}: "


def _not_yaml(error: Exception, text: str) -> tuple[str, str]:
    """Where it stops being YAML, as far as that is known, and why."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        said = error.problem or error.context or "cannot be read"
        return (f"line {mark.line + 1}: " if mark else ""), said
    if isinstance(error, ReaderError):
        return f"line {text.count(chr(10), 0, error.position) + 1}: ", error.reason
    return "", "it is nested too deeply"


def _kind(node: Node) -> str:
    if isinstance(node, MappingNode):
        return "a mapping"
    if isinstance(node, SequenceNode):
        return "a list" if node.value else "an empty list"
    return "a single value" if node.value else "empty"


def _turns(text: str, system: str | None) -> tuple[Turn, ...]:
    asked = Turn("user", text)
    return (Turn("system", system), asked) if system else (asked,)


# -------------------------------------------------------------------------------------------------
# Questions with known answers from the rows that a run kept for validation. No torch here.

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
    coder = Coder.as_saved(TextTokenizer(run.path / ADAPTER))
    data = rows_of_run(run, coder, remedy=_REMEDY)
    there = len(data.rows)
    examples = data.examples(spread(count, there))
    if any(example.is_completion for example in examples):
        raise DataError(
            f"{run.path}: its rows are texts without questions, there is nothing to ask. {_REMEDY}"
        )
    notes = list(data.notes)
    if count > there:
        notes.append(
            f"{count:,} rows were asked for, and the run kept {plural(there, 'row')} for validation"
        )
    return ValidationQuestions(
        [of_example(example) for example in examples],
        f"{len(examples)} of {plural(there, 'validation row')} of {short_path(str(run.path))}",
        (*notes, *_notes(run, others)),
    )


def _notes(run: Run, others: Sequence[Run]) -> list[str]:
    return [
        f"{other.path} was trained with another split or on other data, so it may have been trained"
        " on these rows"
        for other in others
        if not run.same_split(other)
    ]
