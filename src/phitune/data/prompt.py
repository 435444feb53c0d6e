"""Prompt formats: a prompt and its answer as segments of text; only the answer is trained.

A format also knows what ends an answer and how a chat template of the same form reads, so that the
form a model was trained in travels with its adapter. No tokens and no torch here.

A segment is either *control* (written by the format: special tokens in it are tokens) or plain
(written by the user: `<|end|>` in it is seven characters). The user's text is never edited.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phitune.errors import ModelError


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered example; concatenated they are the text the model sees."""

    text: str
    control: bool = False


class PromptFormat(Protocol):
    """How a prompt is put to the model and what its answer looks like."""

    @property
    def end_token(self) -> str:
        """The special token that closes every answer."""
        ...

    @property
    def chat_template(self) -> str:
        """A Jinja template of the same form, for servers that read one beside the adapter."""
        ...

    def prompt(self, prompt: str) -> list[Segment]:
        """What the model is given, in training and when it answers."""
        ...

    def answer(self, response: str) -> list[Segment]:
        """What follows the prompt: the response and the end token, both trained."""
        ...

    def response(self, answer: str) -> str:
        """The response in an answer's decoded text: `answer` undone."""
        ...


@dataclass(frozen=True)
class InstructFormat:
    """`Instruct: {prompt}\\n\\nOutput: {response}` and the end token.

    The space after `Output:` belongs to the answer: byte-level tokenizers keep a word and the
    space before it in one token, which a prompt ending in that space would break.
    """

    end_token: str
    bos_token: str = ""  # Only for tokenizers that put one in front of every text.

    def prompt(self, prompt: str) -> list[Segment]:
        text = Segment(f"Instruct: {prompt}\n\nOutput:")
        return [Segment(self.bos_token, control=True), text] if self.bos_token else [text]

    def answer(self, response: str) -> list[Segment]:
        return [
            Segment(f" {response}"),
            Segment(self.end_token, control=True),
        ]

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
            "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] }}"
            "{% if loop.last %}{{ "
            f"{self.end_token!r}"
            " }}{% else %}{{ '\n\n' }}{% endif %}{% endif %}{% endfor %}"
        ).replace("\n", "\\n")


# Stand-ins for the texts while a template is rendered: letters no template looks at or splits.
_USER, _ASSISTANT = "\ue000user\ue000", "\ue000assistant\ue000"


@dataclass(frozen=True)
class ChatFormat:
    """The model's own chat template, cut at the places where the texts go.

    Rendering stand-ins instead of the texts tells the template's own special tokens from those a
    user typed, and keeps a template that strips texts from editing them.
    """

    before: str
    between: str
    end_token: str
    chat_template: str

    @classmethod
    def from_template(
        cls, chat_template: str, special_tokens: dict[str, str], control_tokens: list[str]
    ) -> "ChatFormat":
        """Learns the form from a template.

        Args:
            chat_template: Jinja source, as in tokenizer_config.json; run in a sandbox.
            special_tokens: bos_token, eos_token and the like, which templates may name.
            control_tokens: every special token, to find the one that ends an answer.

        Raises:
            ModelError: the template fails, or does not keep prompt and answer in order.
        """
        user = {"role": "user", "content": _USER}
        assistant = {"role": "assistant", "content": _ASSISTANT}
        prompt = render(chat_template, [user], special_tokens, add_generation_prompt=True)
        whole = render(chat_template, [user, assistant], special_tokens)
        if prompt.count(_USER) != 1 or whole.count(_ASSISTANT) != 1 or not whole.startswith(prompt):
            raise ModelError(
                "the model's chat template does not put the answer right after the prompt; "
                "use --prompt_format instruct"
            )
        before, between = prompt.split(_USER)
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
        return cls(before, between, end_token, chat_template)

    def prompt(self, prompt: str) -> list[Segment]:
        return [
            Segment(self.before, control=True),
            Segment(prompt),
            Segment(self.between, control=True),
        ]

    def answer(self, response: str) -> list[Segment]:
        return [
            Segment(response),
            Segment(self.end_token, control=True),
        ]

    def response(self, answer: str) -> str:
        return answer


def render(
    chat_template: str,
    messages: list[dict[str, Any]],
    special_tokens: dict[str, str],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation through a chat template, in Jinja's sandbox.

    Raises:
        ModelError: the template is not Jinja, or gives up on these messages.
    """
    try:
        text: str = _compiled(chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens
        )
        return text
    except TemplateSyntaxError as error:
        raise ModelError(f"the chat template is not Jinja: {error}") from None
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise ModelError(f"the chat template failed: {error}") from None


@functools.lru_cache(maxsize=8)
def _compiled(chat_template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    # Marks what the assistant says, for trainers that mask by template; plain text to us.
    chat_template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", chat_template)
    return environment.from_string(chat_template)
