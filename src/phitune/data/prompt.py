"""Prompt formats: a conversation as segments of text; only what the assistant says is trained.

A format also knows what ends an answer and how a chat template of the same form reads, so that the
form a model was trained in travels with its adapter. No tokens and no torch here.

A segment is either *control* (written by the format: special tokens in it are tokens) or plain
(written by the user: `<|end|>` in it is seven characters). The user's text is never edited.

Every answer ends with the end token, also where the conversation goes on after it: that is where
inference stops, so that is what the next question follows.
"""

import functools
import re
import threading
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    KeysView,
    Mapping,
    Sequence,
    Set,
    ValuesView,
)
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from phitune.data.dataset import Role, Turn
from phitune.errors import ModelError

# -------------------------------------------------------------------------------------------------
# Chat templates, which are programs of strangers: rendered in Jinja's sandbox, within limits.
#
# Jinja's sandbox keeps a template from Python's insides, but not from running for hours or filling
# the memory. Here everything a template makes (texts, lists, numbers) is measured, before it is
# made where it could grow; every turn of a loop, filter and call looks at the processor time; and
# filters and methods that do nothing but fill are taken away. What a conversation needs stays far
# below the limits.

MAX_SOURCE = 2**15  # characters of a template; the longest in use have half of it
MAX_VALUE = 2**20  # characters of a text, or of a list as it would be written
MAX_MADE = 2**26  # characters of everything that is made in one rendering
MAX_DEPTH = 50  # of lists in lists
MAX_BITS = 2**12  # of a whole number
MAX_SECONDS = 1.0  # of processor time
_NODE = 16  # characters that a list's entry counts for, besides its own
_SAID = 300  # characters of a template's own error that are passed on
# The filters that conversations are written with; those left out fill, or ask for much.
_FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby indent int items join last
    length list lower map max min reject rejectattr replace reverse round safe select selectattr
    sort string title tojson trim truncate unique upper urlencode wordcount
"""
_GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")
# Methods that do.
_FILLING = """
    center encode expandtabs format format_map from_bytes fromkeys ljust maketrans rjust to_bytes
    translate zfill
"""
# One place of a %-format: its key, flags, width and precision.
_DIRECTIVE = re.compile(r"%(?:\([^()]{0,99}\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")


class _TooMuchError(TemplateError):
    """A limit was passed; the message says which."""


class _Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.made = 0
        self.ends = time.thread_time() + MAX_SECONDS

    def step(self) -> None:
        if time.thread_time() > self.ends:
            raise _TooMuchError(f"it runs for more than {MAX_SECONDS:g} s")

    def expect(self, size: int) -> None:
        """Refuses to make a value of so many characters."""
        if size > MAX_VALUE:
            raise _TooMuchError(f"it makes a value of more than {MAX_VALUE:,} characters")

    def add(self, value: Any) -> None:
        self.step()
        size = _size(value)
        self.expect(size)
        self.made += size
        if self.made > MAX_MADE:
            raise _TooMuchError(f"it makes more than {MAX_MADE:,} characters")


_running = threading.local()


def _meter() -> _Meter:
    meter: _Meter = _running.meter
    return meter


def _size(value: Any) -> int:
    """Characters of a value as it would be written, counted no further than MAX_VALUE."""
    size, rest = 0, [(value, 0)]
    while rest and size <= MAX_VALUE:
        value, depth = rest.pop()
        if isinstance(value, str):
            size += len(value)
            continue
        size += _NODE
        if depth > MAX_DEPTH:
            raise _TooMuchError(f"it makes lists in lists, more than {MAX_DEPTH} deep")
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise _TooMuchError(f"it makes a number of more than {MAX_BITS:,} bits")
        elif isinstance(value, Namespace):
            # Its own way of getting attributes looks them up among those the template set.
            rest.append((object.__getattribute__(value, "_Namespace__attrs"), depth + 1))
        elif isinstance(value, Mapping):
            rest += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, Sequence | Set | ItemsView | KeysView | ValuesView) and not (
            isinstance(value, range)
        ):
            size += _NODE * len(value)
            if size <= MAX_VALUE:
                rest += [(part, depth + 1) for part in value]
    return size


class _Metering(NodeTransformer):
    """Puts the meter into a template's syntax tree, where no method of the environment is asked."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        texts: list[nodes.Expr] = [_filter(self.visit(part), "string") for part in node.nodes]
        return functools.reduce(lambda a, b: nodes.Add(a, b, lineno=node.lineno), texts)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else _filter(self.visit(part), "string")
            for part in node.nodes
        ]
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        step = _filter(nodes.Const(0, lineno=node.lineno), "step")
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "measured") if node.ctx == "load" else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return _filter(self.generic_visit(node), "measured")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return _filter(self.generic_visit(node), "measured")


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a meter at all places where values are made."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        # Unoptimised: nothing is computed before it is asked for.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False)
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals["raise_exception"] = _raise_exception
        self.filters = {name: _metered(name, FILTERS[name]) for name in _FILTERS.split()}
        self.filters["step"] = self.filters["measured"] = _measured

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return template

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins what was put out, by the template, a macro or a block."""
        kept: list[str] = []
        size = 0
        for part in parts:
            _meter().step()
            size += len(part)
            _meter().expect(size)
            kept.append(part)
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _FILLING.split() and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No place for `str.format`, which `is_safe_attribute` refuses."""

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _meter().add((args, kwargs))
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and args:
            args = (_joinable(args[0], owner),)
        elif isinstance(owner, str) and name == "replace":
            _expect_replacement(owner, *args)
        return _measured(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter()
        if operator == "+" and not isinstance(left, int | float):
            meter.expect(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _expect_formatted(left, right)
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if not isinstance(value, int | float) and isinstance(times, int):
                    meter.expect(_size(value) * max(0, times))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            meter.expect(0 if left.bit_length() * right <= MAX_BITS else MAX_VALUE + 1)
        return _measured(super().call_binop(context, operator, left, right))


def _measured(value: Any) -> Any:
    _meter().add(value)
    return value


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what it is given, where it could grow, and at what it made."""

    @functools.wraps(function)  # Keeps the marks of those that want the context.
    def metered(*given: Any, **options: Any) -> Any:
        meter = _meter()
        meter.add((given, options))
        # Some filters are handed Jinja's context first.
        first = int(hasattr(function, "jinja_pass_arg"))
        value, arguments = given[first], [*given[first + 1 :], *options.values()]
        numbers = [abs(n) for n in arguments if isinstance(n, int)]
        if name == "join":
            separator = next((text for text in arguments if isinstance(text, str)), "")
            given = (*given[:first], _joinable(value, separator), *given[first + 1 :])
        elif name == "replace":
            _expect_replacement(str(value), *arguments)
        elif name == "indent":
            widths = [len(text) for text in arguments if isinstance(text, str)] + numbers
            meter.expect((str(value).count("\n") + 2) * max(widths, default=4))
        elif name in ("tojson", "round") and max(numbers, default=0) > _NODE:
            raise _TooMuchError(f"it asks the filter {name} for {max(numbers):,} digits or spaces")
        return _measured(function(*given, **options))

    return metered


def _joinable(parts: Any, separator: str) -> list[Any]:
    """Values as a list that may be joined."""
    listed = list(parts)
    _meter().expect(_size(listed) + len(separator) * len(listed))
    return listed


def _expect_replacement(text: str, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    old, new = str(old), str(new)
    _meter().expect(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _expect_formatted(text: str, values: Any) -> None:
    """Refuses widths, and texts that are put in more often than there is room."""
    for place in _DIRECTIVE.finditer(text):
        asked = [place[1] or "", place[2] or ""]
        if "*" in asked or max(map(len, asked)) > 2 or text.startswith("(", place.end()):
            raise _TooMuchError(f"it formats a value by {text[place.start() :][:20]!r}")
    _meter().expect(len(text) + text.count("%") * _size(values))


def render(
    chat_template: str,
    messages: list[dict[str, Any]],
    special_tokens: dict[str, str],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation through a chat template, in Jinja's sandbox.

    Raises:
        ModelError: the template is not Jinja, gives up on these messages, or passes a limit.
    """
    if len(chat_template) > MAX_SOURCE:
        raise ModelError(
            f"the chat template has {len(chat_template):,} characters, more than {MAX_SOURCE:,}"
        )
    _running.meter = _Meter()
    try:
        text: str = _compiled(chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **special_tokens
        )
        return text
    except _TooMuchError as error:
        raise ModelError(f"the chat template was stopped: {error}") from None
    except (TemplateSyntaxError, SyntaxError) as error:
        raise ModelError(f"the chat template is not Jinja: {_brief(error)}") from None
    except Exception as error:  # It is a program, and may raise whatever it likes.
        raise ModelError(f"the chat template failed: {_brief(error)}") from None


def _brief(error: Exception) -> str:
    said = str(error) or type(error).__name__
    return said if len(said) <= _SAID else said[:_SAID] + "..."


@functools.lru_cache(maxsize=8)
def _compiled(chat_template: str) -> Any:
    # Marks what the assistant says, for trainers that mask by template; plain text to us.
    chat_template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", chat_template)
    return _Environment().from_string(chat_template)


# -------------------------------------------------------------------------------------------------


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
