"""What can be wrong with a single row: one small function for each thing that is looked for.

A function is given the texts of a row and says what it found, in a few words, or nothing. The table
at the end says what each finding means: from which share of the rows on it is a warning or an
error, and what to do about it. Errors stop `phitune train`, so they are what nobody can mean.

Only what the texts themselves show is looked for here; what takes all rows to see is in
`findings.py`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phitune.data.dataset import Example

# -------------------------------------------------------------------------------------------------
# E-mail addresses and keys in a text, and how they may be shown: never whole.
#
# A model that is trained on them may say them to anybody. Only forms that are hardly ever
# something else are looked for; a name or a telephone number is not found.

# A search for these letters is fast, and a text without any of them needs no other.
_SIGNS = (
    *("@", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
    *("sk-", "sk_", "xox", "AIza", "-----BEGIN", "hf_", "eyJ"),
)
_ASSIGNING = ("api", "secret", "token", "passw")

_EMAIL = re.compile(
    r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}\b"
)
# Domains that stand for nobody's address (RFC 2606).
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
_SHOWN = 4


def secret_in(text: str) -> str | None:
    """The first address or key in a text, with all but its beginning hidden; None without one."""
    if any(sign in text for sign in _SIGNS):
        if key := _KEY.search(text):
            return f"key {hidden(key.group())}"
        for email in _EMAIL.finditer(text):
            name, _, domain = email.group().partition("@")
            if not _EXAMPLE_DOMAIN.search(domain):
                return f"e-mail {name[0]}...@{domain[0]}...{domain[domain.rindex('.') :]}"
    lowered = text.lower()
    if any(word in lowered for word in _ASSIGNING):
        for match in _ASSIGNED.finditer(text):
            value = match.group(1)
            # Words and variables have no digits; what does and is this long is no word.
            if any(c.isdigit() for c in value) and any(c.isalpha() for c in value):
                return f"key {hidden(value)}"
    return None


def hidden(secret: str) -> str:
    return f"{secret[:_SHOWN]}... ({len(secret)} characters)"


# -------------------------------------------------------------------------------------------------

QUOTED = 40  # characters of a text that a finding shows


@dataclass(frozen=True, slots=True)
class RowTexts:
    """The texts of a row in the ways the checks ask for them."""

    pairs: tuple[tuple[str, str], ...]  # each answer with the text it follows directly
    prompts: tuple[str, ...]  # what is not an answer
    answers: tuple[str, ...]
    whole: str  # all of it, one text a line
    special_tokens: "re.Pattern[str]"
    completion: bool = False

    @classmethod
    def of(cls, example: Example, special_tokens: "re.Pattern[str]") -> "RowTexts":
        turns = example.turns
        return cls(
            tuple(
                (before.content, turn.content)
                for before, turn in pairwise(turns)
                if turn.role == "assistant" != before.role
            ),
            tuple([turn.content for turn in turns if turn.role != "assistant"]),
            tuple([turn.content for turn in turns if turn.role == "assistant"]),
            "\n".join([turn.content for turn in turns]),
            special_tokens,
            example.is_completion,
        )


# What a prompt looks like that went through somebody's template already. Phi's own, then those of
# Alpaca, ChatML, Llama 2, Gemma and Vicuna.
_TEMPLATE = re.compile(
    r"^\s*Instruct:|^\s*Output:\s*\Z|<\|(?:user|assistant|system|im_start)\|>"
    r"|^\s*###\s*(?:Instruction|Input|Response|Human|Assistant|Question|Answer)\b"
    r"|\[/?INST\]|<<SYS>>|<start_of_turn>"
    r"|^(?:Human|Assistant|USER|ASSISTANT|User|Question|Answer):\s*\Z",
    re.MULTILINE,
)
_TEMPLATE_IN_ANSWER = re.compile(
    r"\A\s*(?:Output:|###\s*(?:Response|Answer|Assistant)\b|<\|assistant\|>|<start_of_turn>|\[/INST\])"
    r"|^\s*Instruct:|^###\s*(?:Instruction|Human)\b|<\|(?:user|im_start)\|>|\[/?INST\]",
    re.MULTILINE,
)
_TEMPLATE_SIGNS = ("###", "<|", "<<", "<s", "INST", "Instruct:", "Output:")


def in_a_template(row: RowTexts) -> str | None:
    """The mark of a prompt template in a row that will be put into another one."""
    # A completion is trained as it is; a template in it is the user's choice.
    if row.completion:
        return None
    for texts, pattern in ((row.prompts, _TEMPLATE), (row.answers, _TEMPLATE_IN_ANSWER)):
        for text in texts:
            if (any(sign in text for sign in _TEMPLATE_SIGNS) or text.rstrip().endswith(":")) and (
                found := pattern.search(text)
            ):
                return quoted(found.group().strip())
    return None


def special_tokens_inside(row: RowTexts) -> str | None:
    """A special token written out as text: it would be letters, not the token."""
    found = row.special_tokens.search(row.whole) if "<" in row.whole else None
    return quoted(found.group()) if found else None


_HAS_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


def answer_without_letters(row: RowTexts) -> str | None:
    """An answer of signs alone. A number is an answer; "..." and "-" are not."""
    for answer in row.answers:
        if not _HAS_LETTER_OR_DIGIT.search(answer):
            return quoted(answer.strip())
    return None


_FIRST_WORDS = 3
_FEWEST_CHARACTERS = 10


def prompt_ends_in_the_answer(row: RowTexts) -> str | None:
    """At least three words that end a prompt and begin its answer again."""
    for prompt, answer in row.pairs:
        first = " ".join(answer.split(maxsplit=_FIRST_WORDS)[:_FIRST_WORDS])
        if len(first) < _FEWEST_CHARACTERS or first.count(" ") < _FIRST_WORDS - 1:
            continue
        end, answer = prompt.rstrip(), answer.lstrip()
        # The prompt's end may hold more words of the answer than the three it is found by.
        at = end.rfind(first)
        if at >= 0 and answer.startswith(end[at:]):
            return quoted(end[at:])
    return None


def spaces_at_the_seam(row: RowTexts) -> str | None:
    """Spaces or line breaks that end a prompt or begin an answer: other tokens than without."""
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
    """A place somebody was to fill in: {{name}}, [your name], <insert date>."""
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
    """Letters that were lost on the way: U+FFFD, UTF-8 read as Latin-1, control characters."""
    found = _DAMAGED.search(row.whole)
    return ascii(found.group()) if found else None


def secret_inside(row: RowTexts) -> str | None:
    """An e-mail address or something that looks like a key; shown by its beginning only."""
    return secret_in(row.whole)


def quoted(text: str) -> str:
    """A text in quotes, cut to a few words, with whatever would move the cursor written out."""
    return repr(text if len(text) <= QUOTED else text[: QUOTED - 3] + "...")


# Without a tokenizer: the tokens that end or separate texts for one model or another.
COMMON_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|end|>",
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "<s>",
    "<unk>",
)
# Their place is a template's, which has a check of its own.
_ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>")


def special_token_pattern(control_tokens: Sequence[str]) -> "re.Pattern[str]":
    """Finds the special tokens of a tokenizer, and those that end texts for other models."""
    names = {*control_tokens, *COMMON_SPECIAL_TOKENS[:4]} - set(_ROLE_TOKENS)
    if not control_tokens:
        names.update(COMMON_SPECIAL_TOKENS)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


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
        "they are put into --prompt_format once more, which no later prompt will repeat",
        'take the marks out, or train the text as it is: rows of the one field "text"',
        error_from=0.5,
    ),
    RowCheck(
        "special_tokens",
        "special tokens inside texts",
        special_tokens_inside,
        "typed in a text they are letters, not tokens, and will be learnt as letters",
        "take them out; the end token is added to every answer as it is",
    ),
    RowCheck(
        "empty_answers",
        "answers without a letter or digit",
        answer_without_letters,
        "there is nothing to learn from them but to say nothing",
        "give these rows an answer, or take them out",
        error_from=0.5,
    ),
    RowCheck(
        "answer_in_prompt",
        "prompts that end in the answer's first words",
        prompt_ends_in_the_answer,
        "the model learns to say again what the prompt has just said",
        "keep the words on one side only",
    ),
    RowCheck(
        "spaces_at_seam",
        "spaces between prompt and answer",
        spaces_at_the_seam,
        "texts are kept to the last character, and with these the tokens differ from those of a"
        " prompt that is typed later",
        "strip the prompts' ends and the answers' beginnings",
        warning_from=0.01,
    ),
    RowCheck(
        "placeholders",
        "placeholders nobody filled in",
        unfilled_placeholder,
        "the model will say them as they are",
        "fill them in",
    ),
    RowCheck(
        "damaged_text",
        "damaged letters or control characters",
        damaged_text,
        "the model will write such letters too",
        "save the source as UTF-8 and export it again",
    ),
    RowCheck(
        "secrets",
        "e-mail addresses and keys",
        secret_inside,
        "whoever uses the model may be told them",
        "take them out or replace them; a key that was ever in a data set should be revoked",
    ),
)
