"""What can be wrong with a single row: one small function for each thing that is looked for.

A function takes the texts of a row and returns what it found, in a few words, or None. `ROW_CHECKS`
at the end says what each finding means: from which share of the rows on it is a warning or an
error, and what to do about it. Errors stop `phitune train`, so they are what nobody can mean.

Only patterns that are hardly ever anything else are looked for: few false alarms, at the price of
missing names, telephone numbers and wrong answers. What only all rows together show (duplicates,
lengths) is in `report.py`. A check runs on every row, so each first looks for a fixed string.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phitune.data.conversation import Example

QUOTED = 40  # characters of a text that a finding shows


@dataclass(frozen=True, slots=True)
class RowTexts:
    """The texts of a row in the forms the checks need."""

    pairs: tuple[tuple[str, str], ...]  # each answer with the text directly before it
    prompts: tuple[str, ...]  # every turn but the answers
    answers: tuple[str, ...]
    whole: str  # all turns, one after the other on lines of their own
    special_tokens: "re.Pattern[str]"
    completion: bool = False

    @classmethod
    def of(cls, example: Example, special_tokens: "re.Pattern[str]") -> "RowTexts":
        turns = example.turns
        pairs = [
            (before.content, turn.content)
            for before, turn in pairwise(turns)
            if turn.role == "assistant" != before.role
        ]
        return cls(
            tuple(pairs),
            tuple([turn.content for turn in turns if turn.role != "assistant"]),
            tuple([turn.content for turn in turns if turn.role == "assistant"]),
            "\n".join([turn.content for turn in turns]),
            special_tokens,
            example.is_completion,
        )


def quoted(text: str) -> str:
    """A text in quotes, shortened, with control characters written out."""
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 3] + "...")


# -------------------------------------------------------------------------------------------------
# The checks.

# What a prompt looks like that went through somebody's template already. Phi's own, then those of
# Alpaca, ChatML, Llama 2, Gemma and Vicuna. Space before a mark is looked for on its own line only:
# from each of many empty lines to the last of them would take the square of their number.
_TEMPLATE = re.compile(
    r"^[^\S\n]*Instruct:|^[^\S\n]*Output:\s*\Z|<\|(?:user|assistant|system|im_start)\|>"
    r"|^[^\S\n]*###\s*(?:Instruction|Input|Response|Human|Assistant|Question|Answer)\b"
    r"|\[/?INST\]|<<SYS>>|<start_of_turn>"
    r"|^(?:Human|Assistant|USER|ASSISTANT|User|Question|Answer):\s*\Z",
    re.MULTILINE,
)
_TEMPLATE_IN_ANSWER = re.compile(
    r"\A\s*(?:Output:|###\s*(?:Response|Answer|Assistant)\b|<\|assistant\|>|<start_of_turn>|\[/INST\])"
    r"|^[^\S\n]*Instruct:|^###\s*(?:Instruction|Human)\b|<\|(?:user|im_start)\|>|\[/?INST\]",
    re.MULTILINE,
)
# In a text that is trained as it is, only what nobody writes.
_TEMPLATE_IN_TEXT = re.compile(
    r"<\|(?:user|assistant|system|im_start|start_header_id)\|>|^[^\S\n]*Instruct:"
    r"|^[^\S\n]*###\s*(?:Instruction|Response)\b|\[/?INST\]|<<SYS>>|<start_of_turn>",
    re.MULTILINE,
)
_TEMPLATE_SIGNS = ("###", "<|", "<<", "<s", "INST", "Instruct:", "Output:")


def in_a_template(row: RowTexts) -> str | None:
    """The mark of a prompt template in a row that will be put into another one."""
    in_answers = _TEMPLATE_IN_TEXT if row.completion else _TEMPLATE_IN_ANSWER
    for texts, pattern in ((row.prompts, _TEMPLATE), (row.answers, in_answers)):
        for text in texts:
            if (any(sign in text for sign in _TEMPLATE_SIGNS) or text.rstrip().endswith(":")) and (
                found := pattern.search(text)
            ):
                return quoted(found.group().strip())
    return None


# Tokens that end texts for one model or another, looked for with every tokenizer.
_END_TOKENS = ("<|endoftext|>", "<|end|>", "<|im_end|>", "<|eot_id|>")
# And those looked for without one.
_OTHER_TOKENS = ("</s>", "<s>", "<unk>")
# Tokens of a prompt template, which has a check of its own.
_ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>")


def special_token_pattern(control_tokens: Sequence[str]) -> "re.Pattern[str]":
    """Finds the special tokens of a tokenizer, and those that end texts for other models.

    Args:
        control_tokens: the tokenizer's; none without a tokenizer.
    """
    names = {*(control_tokens or _OTHER_TOKENS), *_END_TOKENS} - set(_ROLE_TOKENS)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def special_tokens_inside(row: RowTexts) -> str | None:
    """A special token written as text: the model would see its characters, not the token."""
    found = row.special_tokens.search(row.whole) if "<" in row.whole else None
    return quoted(found.group()) if found else None


_HAS_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


def answer_without_letters(row: RowTexts) -> str | None:
    """An answer of punctuation alone. A number is an answer; "..." and "-" are not."""
    for answer in row.answers:
        if not _HAS_LETTER_OR_DIGIT.search(answer):
            return quoted(answer.strip())
    return None


# What programs write where there is no value.
_EMPTY_WORDS = {"nan", "none", "null", "nil", "nat", "n/a", "#n/a", "<na>", "undefined", "(null)"}


def word_for_nothing(row: RowTexts) -> str | None:
    """A text that is "nan", "None" or the like: an empty cell that went through a program."""
    for text in (*row.answers, *row.prompts):
        if len(text) < 20 and text.strip().lower() in _EMPTY_WORDS:
            return quoted(text.strip())
    return None


# LaTeX has commands such as \neq, so what begins with a small letter may be one.
_ESCAPED_LINE_END = re.compile(r"\\r?\\?n(?![a-z])")


def escaped_line_ends(row: RowTexts) -> str | None:
    """Backslash and n where a line end was: a text of one line that was escaped twice."""
    for text in (*row.answers, *row.prompts):
        if "\\n" in text and "\n" not in text and (found := _ESCAPED_LINE_END.search(text)):
            return quoted(text[max(0, found.start() - 10) : found.end() + 20])
    return None


_HTML = re.compile(
    r"&(?:amp|lt|gt|quot|nbsp|apos|#\d{2,5}|#x[0-9a-fA-F]{2,5});"
    r"|</?(?:p|br|div|span|b|i|strong|em|ul|ol|li|a|td|tr|table|h[1-6])\b[^<>\n]{0,200}>",
    re.IGNORECASE,
)


def html_inside(row: RowTexts) -> str | None:
    """An entity or a tag of HTML outside of code."""
    for text in row.answers:
        if ("&" in text or "<" in text) and "```" not in text and (found := _HTML.search(text)):
            return quoted(found.group())
    return None


_FIRST_WORDS = 3
_FEWEST_CHARACTERS = 10


def prompt_ends_in_the_answer(row: RowTexts) -> str | None:
    """Three or more words at the end of a prompt with which its answer begins again."""
    for prompt, answer in row.pairs:
        first = " ".join(answer.split(maxsplit=_FIRST_WORDS)[:_FIRST_WORDS])
        if len(first) < _FEWEST_CHARACTERS or first.count(" ") < _FIRST_WORDS - 1:
            continue
        end, answer = prompt.rstrip(), answer.lstrip()
        # More of the answer's words than the first three may end the prompt.
        at = end.rfind(first)
        if at >= 0 and answer.startswith(end[at:]):
            return quoted(end[at:])
    return None


def spaces_at_the_seam(row: RowTexts) -> str | None:
    """White space that ends a prompt or begins an answer: it changes the tokens."""
    for prompt, answer in row.pairs:
        if prompt != prompt.rstrip():
            return f"the prompt ends in {prompt[len(prompt.rstrip()) :][:QUOTED]!r}"
        if answer != answer.lstrip():
            start = answer[: len(answer) - len(answer.lstrip())]
            return f"the answer begins with {start[:QUOTED]!r}"
    return None


_PLACEHOLDER = re.compile(
    r"\{\{\s*[A-Za-z_][\w .-]{0,40}\}\}"
    r"|\[(?:your|insert|enter|add|company|customer|first|last|full)[ _-][^\[\]\n]{1,40}\]"
    r"|<(?:your|insert|enter)[ _-][^<>\n]{1,40}>",
    re.IGNORECASE,
)


def unfilled_placeholder(row: RowTexts) -> str | None:
    """A placeholder nobody filled in: {{name}}, [your name], <insert date>."""
    if not ("{{" in row.whole or "[" in row.whole or "<" in row.whole):
        return None
    found = _PLACEHOLDER.search(row.whole)
    return quoted(found.group()) if found else None


# The replacement character, UTF-8 read as Latin-1 or Windows-1252, and control characters.
_DAMAGED = re.compile(
    "\ufffd|\u00c3[\u0080-\u00bf\u0192\u201a\u201e\u2026\u2020\u2021]|\u00e2\u20ac.|\u00e2\u0080."
    "|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)


def damaged_text(row: RowTexts) -> str | None:
    """Damaged characters: U+FFFD, UTF-8 read as Latin-1, control characters."""
    found = _DAMAGED.search(row.whole)
    return ascii(found.group()) if found else None


# -------------------------------------------------------------------------------------------------
# E-mail addresses and keys. A model that was trained on them may tell them to anybody; the report
# itself shows no more than their beginning.

# Most texts have none of these; searching for them is fast.
_SECRET_SIGNS = (
    "@", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-",
    "sk_", "xox", "AIza", "-----BEGIN", "hf_", "eyJ",
)  # fmt: skip
_ASSIGNMENT_SIGNS = ("api", "secret", "token", "passw")
_EMAIL = re.compile(
    r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}\b"
)
# Domains reserved for examples (RFC 2606).
_EXAMPLE_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$", re.I
)
_KEY = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # Amazon
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{22,}|\bglpat-[A-Za-z0-9_-]{20,}"
    r"|\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}|\bsk_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|\bxox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|\bAIza[0-9A-Za-z_-]{35}"  # Google
    r"|\bhf_[A-Za-z0-9]{30,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"  # JSON web tokens
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"
)
_ASSIGNED = re.compile(
    r"(?:api[_-]?key|secret(?:[_-]?key)?|(?:access|auth)[_-]?token|passw(?:or)?d)"
    r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?([A-Za-z0-9/+_=.-]{16,})",
    re.IGNORECASE,
)


def secret_inside(row: RowTexts) -> str | None:
    """The first e-mail address or key of a row, with all but its beginning hidden."""
    text = row.whole
    if any(sign in text for sign in _SECRET_SIGNS):
        if key := _KEY.search(text):
            return _hidden(key.group())
        for email in _EMAIL.finditer(text):
            name, _, domain = email.group().partition("@")
            if not _EXAMPLE_DOMAIN.search(domain):
                return f"e-mail {name[0]}...@{domain[0]}...{domain[domain.rindex('.') :]}"
    lowered = text.lower()
    if any(sign in lowered for sign in _ASSIGNMENT_SIGNS):
        for match in _ASSIGNED.finditer(text):
            value = match.group(1)
            # A value of this length with letters and digits is no word and no variable.
            if any(c.isdigit() for c in value) and any(c.isalpha() for c in value):
                return _hidden(value)
    return None


def _hidden(key: str) -> str:
    return f"key {key[:4]}... ({len(key)} characters)"


# -------------------------------------------------------------------------------------------------
# What each check means.


@dataclass(frozen=True)
class RowCheck:
    """A thing to look for in each row, and what it means."""

    name: str  # as in --json; stable
    title: str
    found: Callable[[RowTexts], str | None]
    why: str  # what happens if it stays
    remedy: str
    warning_from: float = 0.0  # a warning if more than this share of the rows has it
    error_from: float | None = None  # an error from this share on; None: never


ROW_CHECKS = (
    RowCheck(
        "template",
        "rows already in a template",
        in_a_template,
        "inside a text its special tokens are letters, and --prompt_format puts a second template"
        " around it, which no later prompt will have",
        'remove the template: write the turns as "messages", or as a prompt and a response; texts'
        " that are whole conversations in the template of --prompt_format chat, in the instruct"
        " format or in Alpaca's are split by themselves",
        error_from=0.5,
    ),
    RowCheck(
        "special_tokens",
        "special tokens inside texts",
        special_tokens_inside,
        "inside a text they are ordinary characters, and the model learns to write those",
        "remove them; the end token is added to every answer anyway",
        error_from=0.5,
    ),
    RowCheck(
        "empty_answers",
        "answers without a letter or digit",
        answer_without_letters,
        "the model learns to answer nothing",
        "give these rows an answer, or remove them",
        error_from=0.5,
    ),
    RowCheck(
        "empty_words",
        'texts that are "nan", "None" or the like',
        word_for_nothing,
        "they stand for an empty cell, and the model learns to answer with them",
        "remove these rows where the word is no answer",
    ),
    RowCheck(
        "double_escapes",
        "line ends written as a backslash and n",
        escaped_line_ends,
        "the model learns to write the backslash",
        "decode the texts once more before they are written as JSON or CSV",
        warning_from=0.02,
    ),
    RowCheck(
        "html",
        "answers with entities or tags of HTML",
        html_inside,
        "the model learns to write them",
        "convert the texts (Python: html.unescape), unless HTML is what you want",
        warning_from=0.1,
    ),
    RowCheck(
        "answer_in_prompt",
        "prompts that end with the answer's first words",
        prompt_ends_in_the_answer,
        "the model learns to repeat what the prompt has just said",
        "keep these words in the prompt or in the answer, not in both",
    ),
    RowCheck(
        "spaces_at_seam",
        "rows with spaces at the seam of prompt and answer",
        spaces_at_the_seam,
        "texts are used exactly as they are; with these spaces the tokens differ from those of a"
        " prompt that is typed later",
        "strip the ends of the prompts and the beginnings of the answers",
        warning_from=0.01,
    ),
    RowCheck(
        "placeholders",
        "unfilled placeholders",
        unfilled_placeholder,
        "the model learns to write them",
        "fill them in",
    ),
    RowCheck(
        "damaged_text",
        "damaged characters or control characters",
        damaged_text,
        "the model learns to write them",
        "save the source as UTF-8 and export it again",
    ),
    RowCheck(
        "secrets",
        "e-mail addresses or keys",
        secret_inside,
        "the model may tell them to anybody who uses it",
        "remove or replace them; revoke a key that was ever in a data set",
    ),
)
