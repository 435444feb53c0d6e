"""Prompt formats: a conversation as segments of text, of which only the answers are trained.

Two formats: the project's own (`Instruct: ... Output: ...`) and the model's chat template. Each
knows which special token ends an answer and which chat template has the same form, so that an
adapter takes the form it was trained in along with it.

A segment is either control (written by the format: special tokens in it are tokens) or plain
(written by the user: `<|end|>` in it is seven characters). The user's text is never edited, unless
the model's template strips it. The last answer ends with the end token, where inference stops;
those within a conversation too, unless the model's template writes none there.

Knows no token ids (see coder.py) and no torch.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from phitune.data.conversation import Role, Turn
from phitune.data.template import render, searched_texts
from phitune.data.written import PLAIN_FORMS, WrittenForm, exact_form, forms_of
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

    @property
    def written_forms(self) -> tuple[WrittenForm, ...]:
        """Forms in which a text may hold a whole conversation already."""
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
    written_forms: tuple[WrittenForm, ...] = PLAIN_FORMS

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

# Rendered in place of the texts: a character that no template looks at or splits, among what a
# template may change. Several forms of each: spaces may be stripped, of as many as the template
# writes itself, and texts be looked into.
_MARK = "\ue000"
_AROUND = (("\n \t", "\t \n"), (" \n\t", "\t\n "), ("  \n\t", "\t\n   "), ("\n\n \t", "\t \n\n\n"))
_WITHIN = (" aZ\n\n<b>&\"'\\", " 9. " + "Zz \n" * 40 + ".", " b", "")
# What `str.strip` may be given, where nothing or all white space is stripped too.
_STRIPS: tuple[str | None, ...] = ("", "\n", " ", " \n", None)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a template puts the text of a turn."""

    before: str  # what it writes before it, after the text of the turn before
    lstrip: str | None  # characters that it strips from the text, as in `str.lstrip`
    rstrip: str | None

    def text(self, content: str) -> str:
        """A turn's text as the template writes it."""
        return content.lstrip(self.lstrip).rstrip(self.rstrip)


@dataclass(frozen=True)
class ChatFormat:
    """The model's own chat template: what it writes around the texts of a conversation.

    The template is rendered with placeholders, a few times for each sequence of roles, and the
    texts are put in afterwards. So its special tokens are distinguished from those that a user
    typed. Texts are edited as far as the template strips them, and refused where it changes more.

    An answer is what inference is to generate after the prompt that `apply_chat_template` makes: it
    may begin with a text of the template (`lead`) and ends with the end token, before which another
    one may stand (`ending`). Where the template makes no cue to answer, the cue is what it writes
    between a question and its answer.
    """

    end_token: str
    chat_template: str
    special_tokens: tuple[tuple[str, str], ...]  # names and tokens that the template may use
    bos_token: str = ""  # in front of a completion, as in `InstructFormat`
    ending: str = ""  # between an answer and its end token
    lead: str = ""  # before an answer and generated with it, without special tokens
    cues: bool = True  # add_generation_prompt makes a difference
    written_forms: tuple[WrittenForm, ...] = PLAIN_FORMS  # the template itself first
    remedy: str = field(default="", repr=False, compare=False)  # what else a user may do

    @classmethod
    def from_template(
        cls,
        chat_template: str,
        special_tokens: dict[str, str],
        control_tokens: list[str],
        bos_token: str = "",
        remedy: str = "",
    ) -> "ChatFormat":
        """Finds out how a template writes prompts and answers.

        Args:
            chat_template: Jinja source, as in tokenizer_config.json; see template.py.
            special_tokens: bos_token, eos_token and the like, which templates may name.
            control_tokens: every special token, to find the one that ends an answer.
            bos_token: what the tokenizer itself puts in front of a text, or "".
            remedy: for the user, where the template cannot be used.

        Raises:
            ModelError: the template fails, or has no place for a question and its answer.
        """
        tokens = tuple(special_tokens.items())
        chat = cls(special_tokens["eos_token"], chat_template, tokens, bos_token, remedy=remedy)
        question: tuple[Role, ...] = ("user",)
        answered: tuple[Role, ...] = ("user", "assistant")
        plain, cued = (_rendered(chat.source, question, cued=cued) for cued in (False, True))
        whole = _rendered(chat.source, answered, cued=False)
        for found in (cued, whole):
            if isinstance(found, str):
                raise ModelError(chat._refused(found))
        assert not isinstance(whole, str)
        # The end token: the first after the answer; of two that begin at one place, the longer.
        after = whole[1]
        found_tokens = [token for token in control_tokens if token in after]
        first = min(found_tokens, key=lambda token: (after.index(token), -len(token)), default=None)
        chat = replace(chat, cues=plain != cued)
        if first:
            chat = replace(chat, end_token=first, ending=after[: after.index(first)])
        layout = _layout(chat, answered)
        if isinstance(layout, str):
            raise ModelError(chat._refused(layout))
        lead = layout.leads[1]
        for token in control_tokens:
            lead = lead.replace(token, "")
        chat = replace(chat, lead=lead)
        own = _own_form(chat)
        forms = forms_of(control_tokens)
        return replace(chat, written_forms=(own, *forms) if own else forms)

    @property
    def source(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What decides how a conversation is rendered."""
        return self.chat_template, self.special_tokens

    def refusal(self, turns: Sequence[Turn]) -> str | None:
        if _is_completion(turns):
            return None
        layout = _layout(self, tuple(turn.role for turn in turns))
        if isinstance(layout, str):
            return self._refused(layout)
        if searched := [
            text for text in _searched(self) if any(text in turn.content for turn in turns)
        ]:
            return self._changed_text(turns, layout, searched[0])
        return None

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        if _is_completion(turns):
            return _completion(turns, self.bos_token, self.end_token)
        if refusal := self.refusal(turns):
            raise ModelError(refusal)
        layout = _layout(self, tuple(turn.role for turn in turns))
        assert not isinstance(layout, str)
        return self._segments(turns, layout)

    def _segments(self, turns: Sequence[Turn], layout: "_Layout") -> list[Segment]:
        segments = []
        for turn, place, lead, ends in zip(
            turns, layout.places, layout.leads, layout.ends, strict=True
        ):
            if place.before:
                segments.append(Segment(place.before, control=True))
            trained = turn.role == "assistant"
            if lead:
                segments.append(Segment(lead, control=True, trained=True))
            segments.append(Segment(place.text(turn.content), trained=trained))
            if ends:
                if self.ending:
                    segments.append(Segment(self.ending, control=True, trained=True))
                segments.append(Segment(self.end_token, control=True, trained=True))
        if layout.cue:
            segments.append(Segment(layout.cue, control=True))
        return segments

    def response(self, answer: str) -> str:
        answer = answer.removeprefix(self.lead)
        return answer.removesuffix(self.ending) if self.ending else answer

    def _changed_text(self, turns: Sequence[Turn], layout: "_Layout", searched: str) -> str | None:
        """Compares with what the template makes of the texts themselves, where it may look into
        them.
        """
        is_prompt = turns[-1].role == "user"
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        if is_prompt and not self.cues:
            # Its cue is not what it writes before an answer: that is seen with an answer only.
            messages.append({"role": "assistant", "content": "Text"})
        try:
            text = render(
                self.chat_template,
                messages,
                dict(self.special_tokens),
                add_generation_prompt=is_prompt and self.cues,
            )
        except ModelError as error:
            return self._refused(str(error))
        ours = "".join(segment.text for segment in self._segments(turns, layout))
        if (
            ours.startswith(text)
            if is_prompt and self.cues
            else text.startswith(ours.removesuffix(self.end_token))
        ):
            return None
        return self._refused(
            f"the chat template changes texts with {searched!r} in them, as this one; remove it"
        )

    def _refused(self, cause: str) -> str:
        return f"{cause}; {self.remedy}" if self.remedy else cause


def _own_form(chat: ChatFormat) -> WrittenForm | None:
    """How a conversation is written by the template; None where its turns have no marks."""
    single = _layout(chat, ("user", "assistant"))
    several = _layout(chat, ("user", "assistant", "user", "assistant"))
    system = _layout(chat, ("system", "user", "assistant"))
    assert not isinstance(single, str)
    bos = dict(chat.special_tokens).get("bos_token", "")
    question, answer = (place.before for place in single.places)
    openers: list[tuple[Role | None, Role, str]] = [
        (None, "user", question.removeprefix(bos)),
        ("user", "assistant", answer + single.leads[1]),
    ]
    if not isinstance(several, str):
        end = chat.ending + chat.end_token if several.ends[1] else ""
        openers.append(("assistant", "user", end + several.places[2].before))
    if not isinstance(system, str):
        first, then = (place.before for place in system.places[:2])
        openers += [(None, "system", first.removeprefix(bos)), ("system", "user", then)]
    ends = {chat.ending.strip() + chat.end_token, chat.end_token, bos}
    ends.add(dict(chat.special_tokens)["eos_token"])
    return exact_form("the model's chat template", openers, tuple(sorted(ends - {""})))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the texts of a conversation go."""

    places: tuple[_Place, ...]  # [turns]
    leads: tuple[str, ...]  # [turns] before an answer, and trained with it
    ends: tuple[bool, ...]  # [turns] an answer whose end token follows
    cue: str  # after the last turn of a prompt


@functools.lru_cache(maxsize=8)
def _searched(chat: ChatFormat) -> tuple[str, ...]:
    return tuple(searched_texts(chat.chat_template))


@functools.lru_cache(maxsize=4096)
def _rendered(
    source: tuple[str, tuple[tuple[str, str], ...]], roles: tuple[Role, ...], *, cued: bool
) -> "tuple[tuple[_Place, ...], str] | str":
    """The place of each turn and what follows the last, or why the template cannot be used.

    Args:
        source: the template, and the special tokens that it may name.
        cued: with the cue to answer.
    """

    def rendered(texts: Sequence[str]) -> str:
        template, special_tokens = source
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
        ]
        return render(template, messages, dict(special_tokens), add_generation_prompt=cued)

    plain = [f"Text{index}" for index in range(len(roles))]
    forms = []
    try:
        as_plain = rendered(plain)
        for (left, right), within in zip(_AROUND, _WITHIN, strict=True):
            texts = [f"{_MARK}{index}{_MARK}{within}{_MARK}" for index in range(len(roles))]
            between = _split(rendered([left + text + right for text in texts]), roles, texts)
            if isinstance(between, str):
                return between
            forms.append(between)
    except ModelError as error:
        return f"{error} on the turns {', '.join(roles)}"

    # What the template itself writes, of which all forms must have the same.
    gaps = []
    for index, written in enumerate(zip(*forms, strict=True)):
        gap = _gap(written, after_text=index > 0, before_text=index < len(roles))
        if gap is None:
            return f"the chat template looks into the text of {_turn(roles[index - (index > 0)])}"
        gaps.append(gap)
    places = tuple(
        _Place(gap.text, gap.lstrip, after.rstrip) for gap, after in itertools.pairwise(gaps)
    )
    last = gaps[-1].text
    composed = "".join(place.before + text for place, text in zip(places, plain, strict=True))
    if composed + last != as_plain:
        return f"the chat template looks into the text of {_turn(roles[-1])}"
    return places, last


def _split(rendered: str, roles: Sequence[Role], texts: Sequence[str]) -> list[str] | str:
    """What stands before each text and after the last, or why that cannot be told."""
    between: list[str] = []
    rest = rendered
    for role, text in zip(roles, texts, strict=True):
        if rest.count(text) == 1:
            before, _, rest = rest.partition(text)
            between.append(before)
        elif text in rest:
            return f"the chat template writes the text of {_turn(role)} twice"
        elif text in rendered:
            return "the chat template writes these turns in another order than they come in"
        elif text[:4] in rendered:
            return f"the chat template changes the text of {_turn(role)}"
        else:
            return f"the chat template has no place for {_turn(role)} here"
    return [*between, rest]


def _turn(role: Role) -> str:
    return f"{'an' if role == 'assistant' else 'a'} {role} turn"


@dataclass(frozen=True, slots=True)
class _Gap:
    """What a template writes between two texts, and what it strips from them there."""

    text: str
    rstrip: str | None  # of the text before
    lstrip: str | None  # of the text after


def _gap(texts: Sequence[str], *, after_text: bool, before_text: bool) -> _Gap | None:
    """The gap that leaves all forms with the same text; None if there is none.

    Args:
        texts: what stands between the two in each form, what is left of their spaces included.
    """
    for rstrip in _STRIPS if after_text else ("",):
        for lstrip in _STRIPS if before_text else ("",):
            found = set()
            for form, text in enumerate(texts):
                left = _AROUND[form][1].rstrip(rstrip) if after_text else ""
                right = _AROUND[form][0].lstrip(lstrip) if before_text else ""
                fits = len(left) + len(right) <= len(text)
                if not (fits and text.startswith(left) and text.endswith(right)):
                    break
                found.add(text[len(left) : len(text) - len(right)])
            else:
                if len(found) == 1:
                    return _Gap(found.pop(), rstrip, lstrip)
    return None


@functools.lru_cache(maxsize=4096)
def _layout(chat: ChatFormat, roles: tuple[Role, ...]) -> _Layout | str:
    """Where the texts of a prompt, or of a row to train on, go; or why they cannot."""
    is_prompt = roles[-1] != "assistant"
    rendered = _rendered(chat.source, roles, cued=is_prompt)
    if isinstance(rendered, str):
        return rendered
    places, after = [*rendered[0]], rendered[1]
    if is_prompt and not chat.cues:
        # The cue is what the template writes before an answer.
        answered = _rendered(chat.source, (*roles, "assistant"), cued=False)
        if not isinstance(answered, str) and answered[0][:-1] == rendered[0]:
            between = answered[0][-1].before
            # Spaces before an answer are its own, as in `InstructFormat`.
            if not between.startswith(after) or between[len(after) :].strip():
                after = between.rstrip(" ")
    leads, ends = [""] * len(roles), [False] * len(roles)
    for index, role in enumerate(roles):
        if role != "assistant":
            continue
        # What inference is given before this answer.
        if index:
            prompt = _layout(chat, roles[:index])
            if isinstance(prompt, str):
                return prompt
            before = places[index].before
            there = _Layout(
                tuple(places[:index]), tuple(leads[:index]), tuple(ends[:index]), prompt.cue
            )
            if there == prompt and before.startswith(prompt.cue):
                leads[index] = before[len(prompt.cue) :]
                places[index] = replace(places[index], before=prompt.cue)
            elif not is_prompt:
                if there == prompt:
                    return (
                        f"the chat template writes {prompt.cue!r} before an answer that is"
                        f" generated, and {before!r} before one that is trained"
                    )
                return (
                    "the chat template writes the beginning of a conversation differently once"
                    " more turns follow, so its answers have not one prompt"
                )
        # What follows it. Within a conversation some templates write no end token.
        follows = places[index + 1].before if index + 1 < len(roles) else after
        end = chat.ending + chat.end_token
        ends[index] = follows.startswith(end)
        if ends[index] and index + 1 < len(roles):
            places[index + 1] = replace(places[index + 1], before=follows[len(end) :])
        elif ends[index] and is_prompt:
            after = follows[len(end) :]
        if index + 1 == len(roles):
            ends[index] = True
    return _Layout(tuple(places), tuple(leads), tuple(ends), after if is_prompt else "")
