"""Chat templates by the thousand, put together from random pieces: the ids of transformers.

    python benchmarks/fuzz_templates.py [--cases 2500] [--seed N] [--jobs N]

A template has marks and ends of roles, white space, cues, default system prompts, tags for
generation, macros, loop controls and conditions, as they are found in the field and as they are
not. Each is used on conversations of one and several turns, with and without a system turn. A case
fails where `ChatFormat` neither gives what `apply_chat_template` gives nor refuses with a reason,
raises anything else, or takes more than five seconds. Writes results/fuzz_templates.json and .md.
"""

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from fuzz import flags_of, in_processes, total
from machine import save

from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.prompt import ChatFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError
from phitune.model.files import ASSETS

CASES = 2500
SECONDS = 5.0
_TOKENS = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s>", "</s>", "<think>", "</think>")
_TEXTS = (
    ("What is 2 plus 2?", "It is 4."),
    ("Who?", "Me.", "Why (so)?", "Because, {x}."),
    (None, "Be brief.", "Hi there, you!", "Hello.\n\nYes?"),
    (None, "Be kind.", "Who?", "Me.", "Why?", "Because."),
    ("  Who?\n", "\nMe. ", "A </think> b", "c </think> d"),
)
CONVERSATIONS = tuple(
    (Turn("system", str(texts[1])),) * (texts[0] is None)
    + tuple(
        Turn("assistant" if index % 2 else "user", str(text))
        for index, text in enumerate(texts[2:] if texts[0] is None else texts)
    )
    for texts in _TEXTS
)


class Shape(random.Random):
    """Draws a template."""

    def some(self, *choices: str) -> str:
        return self.choice(choices)

    def perhaps(self, share: float, text: str) -> str:
        return text if self.random() < share else ""

    def content(self) -> str:
        """How a turn's text is written."""
        return self.choices(
            (
                "message['content']",
                "message.content",
                "message['content'] | trim",
                "message['content'].strip()",
                "message['content'].lstrip('\\n')",
                "message['content'].rstrip(' ')",
                "message['content'].split('</think>')[-1]",
                "(message['content'] if message['content'] is string else '')",
                "message['content'] | upper",
                "message['content'] | tojson",
                "message['content'][:9]",
                "message['content'].replace('</think>', '')",
            ),
            (9, 9, 6, 6, 2, 2, 1, 2, 1, 1, 1, 1),
        )[0]

    def space(self) -> str:
        return self.some("", "", " ", "\\n", "\\n\\n")

    def mark(self, role: str) -> str:
        named = self.some(role, role.upper(), role.capitalize())
        return self.some(
            f"<|im_start|>{role}\\n", f"<|im_start|>{named}", f"### {named}:\\n", f"{named}: ",
            f"{named}:", "[INST] ", f"<s>{named}", "[INST]", "",
        )  # fmt: skip

    def end(self) -> str:
        return self.space() + self.some("<|im_end|>", "</s>", "[/INST]", "", "") + self.space()

    def turn(self, role: str) -> str:
        open_, close = self.some(("{{", "}}"), ("{{-", "-}}"))  # type: ignore[arg-type]
        mark, end, content = self.mark(role), self.end(), self.content()
        self.last_mark = mark
        text = f"{open_} '{mark}' + ({content}) + '{end}' {close}"
        if role == "assistant":
            kind = self.random()
            if kind < 0.15:
                text = f"{{% generation %}}{text}{{% endgeneration %}}"
            elif kind < 0.3:
                text = f"{open_} '{mark}' + ({content}) {close}" + (
                    f"{{% if loop.last %}}{{{{ '{end}' }}}}{{% else %}}{{{{ '{self.space()}' }}}}"
                    "{% endif %}"
                )
            elif kind < 0.35:
                text = (
                    f"{{% if loop.last %}}{{{{ '<think>{self.space()}</think>' }}}}{{% endif %}}"
                    + text
                )
            elif kind < 0.4:
                text += f"{{{{ '{self.space()}!' if messages|length > 2 }}}}"
        return text + self.some("", "", "\n")

    def template(self) -> str:
        turns = {role: self.turn(role) for role in ("system", "user", "assistant")}
        mark = self.last_mark.rstrip() if self.random() < 0.3 else self.last_mark
        mark = self.mark("assistant") if self.random() < 0.1 else mark
        cue = "{{ '" + mark + self.perhaps(0.05, "<think>") + "' }}"
        dash = self.some("", "", "-")
        tag = lambda text: f"{{%{dash} {text} %}}"  # noqa: E731
        system = self.random()
        body = tag("if message['role'] == 'user'") + turns["user"]
        if system < 0.6:
            body += tag("elif message['role'] == 'system'") + turns["system"]
        elif system < 0.7:
            body += tag("elif message['role'] == 'system'") + "{{ raise_exception('no system') }}"
        body += tag("elif message['role'] == 'assistant'") + turns["assistant"] + tag("endif")
        if self.random() < 0.1:
            body = turns["user"].replace("user", "' + message['role'] + '")
        loop = "message in messages"
        before = self.perhaps(0.3, "{{ bos_token }}")
        if 0.8 < system < 0.9:
            before += (
                "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
                "{% set rest = messages[1:] %}{% else %}{% set s = 'Be good.' %}"
                "{% set rest = messages %}{% endif %}"
            )
            loop = "message in rest"
            where = self.some("loop.first", "loop.last", "loop.index0 == 0")
            body = f"{{% if {where} and s %}}{{{{ s + '\\n' }}}}{{% endif %}}" + body
        before += self.perhaps(
            0.15,
            "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>' }}"
            "{% endif %}",
        )
        body += self.perhaps(0.1, "{% if loop.index > 50 %}{% break %}{% endif %}")
        body = (
            self.perhaps(0.1, "{% if message['role'] == 'tool' %}{% continue %}{% endif %}") + body
        )
        if self.random() < 0.1:
            before += "{% macro say(message, loop) %}" + body + "{% endmacro %}"
            body = "{{ say(message, loop) }}"
        before += self.perhaps(0.1, "{% set ns = namespace(n=0) %}")
        before += self.perhaps(0.05, "{{ strftime_now('%d %b %Y') }}")
        asked = self.some("if add_generation_prompt", "if add_generation_prompt is true")
        after = tag(asked) + cue
        after += self.perhaps(0.3, tag("else") + "{{ eos_token }}") + tag("endif")
        after = self.choices((after, "", cue), (8, 2, 1))[0]
        inside = self.perhaps(0.1, after.replace("if add", "if loop.last and add", 1))
        return (
            before + tag(f"for {loop}") + self.some("", "\n", "\n    ") + body + inside
            + tag("endfor") + ("" if inside else after) + self.perhaps(0.05, "\n")
        )  # fmt: skip


def tokenizers(folder: Path) -> tuple[Any, TextTokenizer]:
    """transformers' and ours, of a model that has the special tokens of the shapes."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny-phi-2" / name, folder / name)
    first = TextTokenizer(folder).size
    spec = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    spec["added_tokens"] += [
        {"id": first + index, "content": token, "special": True, **flags}
        for index, token in enumerate(_TOKENS)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder), TextTokenizer(folder)


def try_template(template: str, theirs: Any, ours: TextTokenizer) -> Counter[str]:
    """What came of the conversations: "equal", "seam", or "refused: ..." by reason.

    Raises:
        AssertionError: something else.
    """
    found: Counter[str] = Counter()
    theirs.chat_template = ours.chat_template = template

    def rendered(turns: Sequence[Turn], *, cue: bool, tokenize: bool = False) -> Any:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return theirs.apply_chat_template(
            messages, add_generation_prompt=cue, tokenize=tokenize, return_dict=False
        )

    def raises(turns: Sequence[Turn], *, cue: bool) -> bool:
        try:
            rendered(turns, cue=cue)
        except Exception:  # Whatever Jinja raises.
            return True
        return False

    refused = ""
    try:
        coder = Coder.of(ours, "chat", remedy="")
    except ModelError as error:
        refused = str(error).partition(": ")[2]
    if refused:
        reason = _reason(refused)
        question = (Turn("user", "Who?"), Turn("assistant", "Me."))
        failed = raises(question[:1], cue=True) or raises(question, cue=False)
        assert failed == (reason == "refused: failed"), (refused, failed)
        found[reason] += 1
        return found
    chat = coder.prompt_format
    assert isinstance(chat, ChatFormat)
    for conversation in CONVERSATIONS:
        for count in range(1, len(conversation) + 1):
            turns = conversation[:count]
            row = turns[-1].role == "assistant"
            if turns[-1].role == "system":
                continue
            if refusal := chat.refusal(turns):
                reason = _reason(refusal)
                before = [turns[:end] for end in range(1, count) if turns[end].role != "user"]
                failed = raises(turns, cue=not row) or any(raises(b, cue=True) for b in before)
                assert failed or reason != "refused: failed", refusal
                found[reason] += 1
                continue
            text, ids = coder.text(turns), coder.encode(turns)
            theirs_text = rendered(turns, cue=not row)
            expected = rendered(turns, cue=not row, tokenize=True)
            if row:
                ended = theirs_text.startswith(text)
                unended = text.removesuffix(chat.ending + chat.end_token)
                assert ended or theirs_text.startswith(unended), (turns, text, theirs_text)
                prompt = coder.encode(turns[:-1])
                assert ids[: len(prompt)] == prompt, turns
                same = expected[: len(ids)] == ids or not ended
            elif text != theirs_text:
                assert not chat.cues, (turns, text, theirs_text)
                whole = rendered((*turns, Turn("assistant", "Yes")), cue=False)
                assert whole.startswith(text), (turns, text, whole)
                continue
            else:
                same = expected == ids
            typed = any(token in turn.content for turn in turns for token in _TOKENS)
            if not same and not typed:
                # White space that belongs to two of GPT-2's words at once: equal in pieces.
                groups = groupby(chat.segments(turns), key=lambda segment: segment.trained)
                pieces = ["".join(segment.text for segment in group) for _, group in groups]
                encoded = [theirs(piece, add_special_tokens=False).input_ids for piece in pieces]
                assert sum(encoded, []) == ids, turns  # noqa: RUF017
            found["equal" if same else "typed special tokens" if typed else "seam"] += 1
    return found


def _reason(refusal: str) -> str:
    assert refusal.startswith("the chat template "), refusal
    if "is not Jinja" in refusal:
        return "refused: failed"
    for words in ("no place for", "in another order", "changes the text", "changes texts", "failed",
                  "looks into", "twice", "writes the beginning", "before an answer"):  # fmt: skip
        if words in refusal:
            return f"refused: {words}"
    raise AssertionError(refusal)


def campaign(cases: int, start: int = 0) -> Counter[str]:
    """Tries templates, one for each case.

    Args:
        cases: how many.
        start: number of the first, which is its seed.

    Raises:
        AssertionError: of the first that fails, with the template.
    """
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = tokenizers(Path(folder))
        for case in range(start, start + cases):
            template = Shape(case).template()
            began = time.process_time(), time.monotonic()
            try:
                came = try_template(template, theirs, ours)
            except Exception as error:
                raise AssertionError(f"case {case}: {template}\n{error!r}") from error
            found["slowest ms"] = max(
                found["slowest ms"], round(1000 * (time.monotonic() - began[1]))
            )
            assert time.process_time() - began[0] < SECONDS, (case, template)
            found.update(came)
            found["templates"] += 1
            found["templates used"] += came["equal"] > 0
    return found


def main() -> None:
    flags = flags_of(__doc__, CASES, seed=0)
    began = time.monotonic()
    shares = in_processes(campaign, flags)
    found = total(shares)
    found["slowest ms"] = max(share["slowest ms"] for share in shares)
    lines = [
        f"{flags.cases:,} templates, each on {sum(map(len, CONVERSATIONS)) - 2} rows and prompts;"
        " transformers' `apply_chat_template` is the judge. equal: the same text and ids. seam: the"
        " same text, and other ids only where a prompt and its answer meet. typed special tokens:"
        " the same text, where ours takes what a user typed for letters.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {found[name]:,} |" for name in sorted(found)),
        "",
        f"No traceback, nothing else; {time.monotonic() - began:,.0f} s.",
    ]
    save("fuzz_templates", "Chat templates from random pieces", lines, {"found": dict(found)})


if __name__ == "__main__":
    main()
