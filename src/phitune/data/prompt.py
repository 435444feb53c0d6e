"""Prompt formats: a conversation as segments of text; only what the assistant says is trained.

A format also knows what ends an answer and how a chat template of the same form reads, so that the
form a model was trained in travels with its adapter. No tokens and no torch here.

A segment is either *control* (written by the format: special tokens in it are tokens) or plain
(written by the user: `<|end|>` in it is seven characters). The user's text is never edited.

Every answer ends with the end token, also where the conversation goes on after it: that is where
inference stops, so that is what the next question follows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from phitune.data.dataset import Role, Turn
from phitune.data.template import render
from phitune.errors import ModelError


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation; concatenated they are the text the model sees."""

    text: str
    control: bool = False
    trained: bool = False


class PromptFormat(Protocol):
    """How a conversation is put to the model."""

    @property
    def end_token(self) -> str:
        """The special token that closes every answer."""
        ...

    @property
    def chat_template(self) -> str:
        """A Jinja template of the same form, for servers that read one beside the adapter."""
        ...

    def refusal(self, turns: Sequence[Turn]) -> str | None:
        """Why these turns cannot be rendered, and what to do; None where they can."""
        ...

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """The conversation as text.

        Turns that end with a user's are what the model is given when it answers, the cue to answer
        included; turns that end with an assistant's are a row to train on. The first, for any
        answer of a row, are the beginning of the second.

        Raises:
            ModelError: they cannot be rendered; see `refusal`.
        """
        ...

    def response(self, answer: str) -> str:
        """The response in an answer's decoded text: its segment undone."""
        ...


def _text_alone(turns: Sequence[Turn], bos_token: str, end_token: str) -> list[Segment]:
    """A completion: a text without any form, learnt from its first word to its end."""
    segments = [Segment(bos_token, control=True)] if bos_token else []
    return [
        *segments,
        Segment(turns[0].content, trained=True),
        Segment(end_token, control=True, trained=True),
    ]


def _is_completion(turns: Sequence[Turn]) -> bool:
    return len(turns) == 1 and turns[0].role == "assistant"


@dataclass(frozen=True)
class InstructFormat:
    """`Instruct: {prompt}\\n\\nOutput: {response}` and the end token, once or in turns.

    Turns stand `\\n\\n` apart; a system turn goes in front. The space after `Output:` belongs to
    the answer: byte-level tokenizers keep a word and the space before it in one token, which a
    prompt ending in that space would break.
    """

    end_token: str
    bos_token: str = ""  # Only for tokenizers that put one in front of every text.

    def refusal(self, turns: Sequence[Turn]) -> str | None:
        return None

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        if _is_completion(turns):
            return _text_alone(turns, self.bos_token, self.end_token)
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


# Stand-ins for the texts while a template is rendered: letters no template looks at or splits.
_USER, _ASSISTANT = "\ue000user\ue000", "\ue000assistant\ue000"


@dataclass(frozen=True)
class ChatFormat:
    """The model's own chat template, cut at the places where the texts go.

    Rendering stand-ins instead of the texts tells the template's own special tokens from those a
    user typed, and keeps a template that strips texts from editing them.
    """

    end_token: str
    chat_template: str
    special_tokens: tuple[tuple[str, str], ...]  # names and tokens that the template may use
    bos_token: str = ""  # In front of a text without any form, as in `InstructFormat`.

    @classmethod
    def from_template(
        cls,
        chat_template: str,
        special_tokens: dict[str, str],
        control_tokens: list[str],
        bos_token: str = "",
    ) -> "ChatFormat":
        """Learns the form from a template.

        Args:
            chat_template: Jinja source, as in tokenizer_config.json; run in a sandbox.
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
        after = whole[len(prompt) + len(_ASSISTANT) :]
        found = [token for token in control_tokens if token in after]
        # The first to come; of two that begin at one place, the longer.
        first = min(found, key=lambda token: (after.index(token), -len(token)), default=None)
        end_token = first or special_tokens["eos_token"]
        return cls(end_token, chat_template, tuple(special_tokens.items()), bos_token)

    def refusal(self, turns: Sequence[Turn]) -> str | None:
        if _is_completion(turns):
            return None
        cut = _cut(self, tuple(turn.role for turn in turns))
        return cut if isinstance(cut, str) else None

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        if _is_completion(turns):
            return _text_alone(turns, self.bos_token, self.end_token)
        cut = _cut(self, tuple(turn.role for turn in turns))
        if isinstance(cut, str):
            raise ModelError(cut)
        segments = []
        for turn, before in zip(turns, cut, strict=False):
            if before:
                segments.append(Segment(before, control=True))
            trained = turn.role == "assistant"
            segments.append(Segment(turn.content, trained=trained))
            if trained:
                segments.append(Segment(self.end_token, control=True, trained=True))
        if turns[-1].role == "user":
            segments.append(Segment(cut[-1], control=True))
        return segments

    def response(self, answer: str) -> str:
        return answer


@functools.lru_cache(maxsize=1024)
def _cut(chat: ChatFormat, roles: tuple[Role, ...]) -> tuple[str, ...] | str:
    """The template's texts before each turn and after the last, without the answers' end tokens.

    Returns:
        One more text than there are turns, or why the template cannot be used on them.
    """
    stand_ins = [f"\ue000{index}\ue000" for index in range(len(roles))]
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, stand_ins, strict=True)
    ]
    asks = roles[-1] == "user"
    try:
        text = render(
            chat.chat_template, messages, dict(chat.special_tokens), add_generation_prompt=asks
        )
    except ModelError as error:
        return f"{error} on the turns {', '.join(roles)}; use --prompt_format instruct"
    cut: list[str] = []
    for role, stand_in in zip(roles, stand_ins, strict=True):
        if text.count(stand_in) != 1:
            return (
                f"the model's chat template has no place for a {role} turn here; use"
                " --prompt_format instruct"
            )
        before, _, text = text.partition(stand_in)
        cut.append(before)
    cut.append(text)
    for index, role in enumerate(roles):
        if role != "assistant":
            continue
        if index + 1 < len(roles):
            if not cut[index + 1].startswith(chat.end_token):
                return (
                    f"the model's chat template does not put {chat.end_token} right after an answer"
                    " when the conversation goes on; use --prompt_format instruct"
                )
            cut[index + 1] = cut[index + 1][len(chat.end_token) :]
        # What inference is given at this point is the beginning of what is trained.
        if index and _cut(chat, roles[:index]) != tuple(cut[: index + 1]):
            return (
                "the model's chat template renders a conversation differently once it has gone on;"
                " use --prompt_format instruct"
            )
    return tuple(cut)
