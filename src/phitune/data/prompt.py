"""Prompt formats: a conversation as segments of text, of which only the answers are trained.

Two formats: the project's own (`Instruct: ... Output: ...`) and the model's chat template. Each
knows which special token ends an answer and which chat template has the same form, so that an
adapter takes the form it was trained in along with it.

A segment is either control (written by the format: special tokens in it are tokens) or plain
(written by the user: `<|end|>` in it is seven characters). The user's text is never edited. Every
answer ends with the end token, also within a conversation: inference stops there, so that is what
the next question follows.

Knows no token ids (see coder.py) and no torch.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from phitune.data.conversation import Role, Turn
from phitune.data.template import render
from phitune.errors import ModelError


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation; concatenated they are the text that the model sees."""

    text: str
    control: bool = False
    trained: bool = False


class PromptFormat(Protocol):
    """How a conversation is written for the model."""

    @property
    def end_token(self) -> str:
        """The special token that ends every answer."""
        ...

    @property
    def chat_template(self) -> str:
        """A Jinja template of the same form, for servers that read one beside the adapter."""
        ...

    def refusal(self, turns: Sequence[Turn]) -> str | None:
        """Why these turns cannot be rendered, and the remedy; None if they can."""
        ...

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """The conversation as text.

        Turns that end with a user's are a prompt, the cue to answer included; turns that end with
        an assistant's are a row to train on. The prompt of any answer in a row is the beginning of
        the row.

        Raises:
            ModelError: they cannot be rendered; see `refusal`.
        """
        ...

    def response(self, answer: str) -> str:
        """The response in the decoded text of an answer: the reverse of its segment."""
        ...


# --- Completions: the same in every format -------------------------------------------------------


def _is_completion(turns: Sequence[Turn]) -> bool:
    return len(turns) == 1 and turns[0].role == "assistant"


def _completion(turns: Sequence[Turn], bos_token: str, end_token: str) -> list[Segment]:
    """A text without any form, trained from its first word to its end."""
    segments = [Segment(bos_token, control=True)] if bos_token else []
    return [
        *segments,
        Segment(turns[0].content, trained=True),
        Segment(end_token, control=True, trained=True),
    ]


# --- The project's own format --------------------------------------------------------------------


@dataclass(frozen=True)
class InstructFormat:
    """`Instruct: {prompt}\\n\\nOutput: {response}` and the end token, for each question and answer.

    `\\n\\n` stands between turns; a system turn comes first. The space after `Output:` belongs to
    the answer: byte-level tokenizers keep a word and the space before it in one token, which a
    prompt ending in that space would split.
    """

    end_token: str
    bos_token: str = ""  # of tokenizers that put one in front of every text

    def refusal(self, turns: Sequence[Turn]) -> str | None:
        return None

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        if _is_completion(turns):
            return _completion(turns, self.bos_token, self.end_token)
        segments = [Segment(self.bos_token, control=True)] if self.bos_token else []
        between = ""
        for turn in turns:
            if turn.role == "assistant":
                segments.append(Segment(f" {turn.content}", trained=True))
                segments.append(Segment(self.end_token, control=True, trained=True))
                between = "\n\n"
                continue
            if turn.role == "system":
                text = f"{turn.content}\n\n"
            else:
                text = f"Instruct: {turn.content}\n\nOutput:"
            segments.append(Segment(between + text))
            between = ""
        return segments

    def response(self, answer: str) -> str:
        return answer.removeprefix(" ")

    @property
    def chat_template(self) -> str:
        return (
            (f"{{{{ {self.bos_token!r} }}}}" if self.bos_token else "")
            + "{% for message in messages %}"
            "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
            "{% elif message['role'] == 'user' %}"
            "{{ 'Instruct: ' + message['content'] + '\n\nOutput:' }}"
            "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + "
            f"{self.end_token!r}"
            " }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
        ).replace("\n", "\\n")


# --- The model's chat template -------------------------------------------------------------------

# Rendered in place of the texts: characters that no template looks at or splits.
_MARK = "\ue000"
_USER, _ASSISTANT = f"{_MARK}user{_MARK}", f"{_MARK}assistant{_MARK}"


@dataclass(frozen=True)
class ChatFormat:
    """The model's own chat template: what it writes around the texts of a conversation.

    The template is rendered with placeholders, once for each sequence of roles, and the texts are
    put in afterwards. So its special tokens are distinguished from those that a user typed, and a
    template that strips texts does not edit them.
    """

    end_token: str
    chat_template: str
    special_tokens: tuple[tuple[str, str], ...]  # names and tokens that the template may use
    bos_token: str = ""  # in front of a completion, as in `InstructFormat`

    @classmethod
    def from_template(
        cls,
        chat_template: str,
        special_tokens: dict[str, str],
        control_tokens: list[str],
        bos_token: str = "",
    ) -> "ChatFormat":
        """Finds out how a template writes prompts and answers.

        Args:
            chat_template: Jinja source, as in tokenizer_config.json; see template.py.
            special_tokens: bos_token, eos_token and the like, which templates may name.
            control_tokens: every special token, to find the one that ends an answer.
            bos_token: what the tokenizer itself puts in front of a text, or "".

        Raises:
            ModelError: the template fails, or does not keep prompt and answer in order.
        """
        user = {"role": "user", "content": _USER}
        assistant = {"role": "assistant", "content": _ASSISTANT}
        try:
            prompt = render(chat_template, [user], special_tokens, add_generation_prompt=True)
            whole = render(chat_template, [user, assistant], special_tokens)
        except ModelError as error:
            raise ModelError(f"{error}; use --prompt_format instruct") from None
        if prompt.count(_USER) != 1 or whole.count(_ASSISTANT) != 1 or not whole.startswith(prompt):
            raise ModelError(
                "the model's chat template does not put the answer right after the prompt; "
                "use --prompt_format instruct"
            )
        if not whole[len(prompt) :].startswith(_ASSISTANT):
            raise ModelError(
                "the model's chat template puts text between the prompt and the answer; "
                "use --prompt_format instruct"
            )
        # The end token: the first after the answer; of two that begin at one place, the longer.
        after = whole[len(prompt) + len(_ASSISTANT) :]
        found = [token for token in control_tokens if token in after]
        first = min(found, key=lambda token: (after.index(token), -len(token)), default=None)
        end_token = first or special_tokens["eos_token"]
        return cls(end_token, chat_template, tuple(special_tokens.items()), bos_token)

    def refusal(self, turns: Sequence[Turn]) -> str | None:
        if _is_completion(turns):
            return None
        around = _around_turns(self, tuple(turn.role for turn in turns))
        return around if isinstance(around, str) else None

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        if _is_completion(turns):
            return _completion(turns, self.bos_token, self.end_token)
        around = _around_turns(self, tuple(turn.role for turn in turns))
        if isinstance(around, str):
            raise ModelError(around)
        segments = []
        for turn, before in zip(turns, around, strict=False):
            if before:
                segments.append(Segment(before, control=True))
            trained = turn.role == "assistant"
            segments.append(Segment(turn.content, trained=trained))
            if trained:
                segments.append(Segment(self.end_token, control=True, trained=True))
        if turns[-1].role == "user":
            segments.append(Segment(around[-1], control=True))
        return segments

    def response(self, answer: str) -> str:
        return answer


@functools.lru_cache(maxsize=1024)
def _around_turns(chat: ChatFormat, roles: tuple[Role, ...]) -> tuple[str, ...] | str:
    """What the template writes before each turn and after the last, answers' end tokens left out.

    Returns:
        One more text than there are turns, or why the template cannot be used on them.
    """
    # Render the placeholders, and split the text at each.
    placeholders = [f"{_MARK}{index}{_MARK}" for index in range(len(roles))]
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, placeholders, strict=True)
    ]
    is_prompt = roles[-1] == "user"
    try:
        text = render(
            chat.chat_template, messages, dict(chat.special_tokens), add_generation_prompt=is_prompt
        )
    except ModelError as error:
        return f"{error} on the turns {', '.join(roles)}; use --prompt_format instruct"
    around: list[str] = []
    for role, placeholder in zip(roles, placeholders, strict=True):
        if text.count(placeholder) != 1:
            return (
                f"the model's chat template has no place for a {role} turn here; use"
                " --prompt_format instruct"
            )
        before, _, text = text.partition(placeholder)
        around.append(before)
    around.append(text)

    # Each answer must be followed by the end token, and must follow what inference is given there.
    for index, role in enumerate(roles):
        if role != "assistant":
            continue
        if index + 1 < len(roles):
            if not around[index + 1].startswith(chat.end_token):
                return (
                    f"the model's chat template does not put {chat.end_token} right after an answer"
                    " within a conversation; use --prompt_format instruct"
                )
            around[index + 1] = around[index + 1][len(chat.end_token) :]
        if index and _around_turns(chat, roles[:index]) != tuple(around[: index + 1]):
            return (
                "the model's chat template renders the beginning of a conversation differently"
                " once more turns follow; use --prompt_format instruct"
            )
    return tuple(around)
