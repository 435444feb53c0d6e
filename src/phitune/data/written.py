"""Texts that hold a whole conversation in a prompt template: taken apart into its turns.

Many programs render rows before they write them, as one text. What was meant are the turns: the
template's special tokens are tokens there, and only answers are to be trained. A text belongs to a
form if it is all of it, from the first turn to the last answer; the rest is for the checks to find.

Knows no tokenizer and no prompt format; a prompt format hands over the forms that it knows.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from phitune.data.conversation import Role, Turn

# A search for white space begins where the white space does: from each of its characters it would
# take the square of their number.
_INPUT = re.compile(r"(?<!\s)\s*\n###\s*Input:?\s*\n*")


@dataclass(frozen=True, slots=True)
class WrittenForm:
    """How a conversation is written as a text.

    `openers` are regular expressions: what opens a turn of one role after a turn of another, or,
    after None, the text. `ends` are tokens that may follow the last answer.
    """

    name: str  # as a user knows it
    openers: tuple[tuple[Role | None, Role, str], ...]
    ends: tuple[str, ...]
    exact: bool = False  # spaces are those of the texts; else they are stripped

    def turns(self, text: str) -> tuple[Turn, ...] | None:
        """The turns of a conversation in this form; None for any other text."""
        openers = _patterns(self)
        turns: list[Turn] = []
        before: Role | None = None
        at = 0
        while True:
            found = [
                (match.start(), -match.end(), role)
                for after, role, pattern in openers
                if after == before
                and (match := (pattern.search if before else pattern.match)(text, at))
            ]
            if not found:
                break
            start, stop, role = min(found)
            if before:
                content = text[at:start]
                if before == "assistant" and not self.exact:
                    content = self._without_ends(content)
                turns.append(Turn(before, self._content(content)))
            before, at = role, -stop
        if before != "assistant":
            return None
        turns.append(Turn(before, self._content(self._without_ends(text[at:]))))
        return tuple(turns) if all(turn.content.strip() for turn in turns) else None

    def _without_ends(self, answer: str) -> str:
        """An answer up to the tokens that end it, or else to the white space behind it."""
        stop = len(answer)
        first = None  # of these tokens
        while True:
            while stop and answer[stop - 1].isspace():
                stop -= 1
            token = next((end for end in self.ends if end and answer.endswith(end, 0, stop)), "")
            if not token:
                return answer[: stop if first is None else first]
            first = stop = stop - len(token)

    def _content(self, text: str) -> str:
        return text if self.exact else _INPUT.sub("\n", text).strip()


@functools.lru_cache(maxsize=16)
def _patterns(form: WrittenForm) -> list[tuple[Role | None, Role, re.Pattern[str]]]:
    return [(after, role, re.compile(pattern)) for after, role, pattern in form.openers]


def exact_form(
    name: str, openers: Iterable[tuple[Role | None, Role, str]], ends: tuple[str, ...]
) -> WrittenForm | None:
    """A form whose openers are texts; None if a turn has no mark of its own.

    White space within and around the marks may be missing or another.
    """
    patterns = []
    for after, role, text in openers:
        mark = text.strip()
        if not mark:
            return None
        spaces = text[len(text.rstrip()) :]
        pattern = r"\s*".join(map(re.escape, mark.split()))
        start = r"\s*" if after is None else ""
        trailing = f"(?:{re.escape(spaces)})?" if spaces else ""
        patterns.append((after, role, f"{start}{pattern}{trailing}"))
    return WrittenForm(name, tuple(patterns), ends, exact=True)


def _marked(
    name: str, system: str, user: str, assistant: str, end: str, ends: tuple[str, ...]
) -> WrittenForm:
    """A form with one mark for each role, and a token after each turn."""
    return WrittenForm(
        name,
        (
            (None, "system", rf"\s*{system}"),
            (None, "user", rf"\s*{user}"),
            ("system", "user", rf"{end}\s*{user}"),
            ("user", "assistant", rf"{end}\s*{assistant}"),
            ("assistant", "user", rf"{end}\s*{user}"),
        ),
        ends,
        exact=True,
    )


_ENDS = ("<|endoftext|>", "</s>", "<|end|>", "<|im_end|>", "<|eot_id|>")
_INSTRUCTION, _RESPONSE = r"###\s*(?:Instruction|Human):?\s*", r"###\s*(?:Response|Assistant):?\s*"

# Known whatever the tokenizer.
PLAIN_FORMS = (
    WrittenForm(
        "the instruct format",
        (
            (None, "user", r"\s*Instruct:[ \t]*"),
            (None, "system", r"(?=\S)(?!###)"),
            ("system", "user", r"\nInstruct:[ \t]*"),
            ("user", "assistant", r"\nOutput:[ \t]*"),
            ("assistant", "user", r"\nInstruct:[ \t]*"),
        ),
        _ENDS,
    ),
    WrittenForm(
        "Alpaca's template",
        (
            (None, "user", rf"\s*(?:Below is an instruction that [^\n]*\n\s*)?{_INSTRUCTION}"),
            (None, "system", r"(?=\S)(?!###|Below is an instruction that )"),
            ("system", "user", rf"\n{_INSTRUCTION}"),
            ("user", "assistant", rf"\n{_RESPONSE}"),
            ("assistant", "user", rf"\n{_INSTRUCTION}"),
        ),
        _ENDS,
    ),
)
# Known where the tokenizer has their tokens: elsewhere they are letters.
_TOKEN_FORMS = (
    (
        ("<|user|>", "<|assistant|>", "<|end|>"),
        _marked(
            "Phi-3's template",
            r"<\|system\|>\n?",
            r"<\|user\|>\n?",
            r"<\|assistant\|>\n?",
            r"<\|end\|>",
            _ENDS,
        ),
    ),
    (
        ("<|im_start|>", "<|im_end|>"),
        _marked(
            "ChatML",
            r"<\|im_start\|>system(?:<\|im_sep\|>|\n)",
            r"<\|im_start\|>user(?:<\|im_sep\|>|\n)",
            r"<\|im_start\|>assistant(?:<\|im_sep\|>|\n)",
            r"<\|im_end\|>",
            _ENDS,
        ),
    ),
)


def forms_of(control_tokens: Iterable[str]) -> tuple[WrittenForm, ...]:
    """The forms that can be told with a tokenizer that has these special tokens."""
    there = set(control_tokens)
    return (*PLAIN_FORMS, *(form for tokens, form in _TOKEN_FORMS if there >= set(tokens)))
