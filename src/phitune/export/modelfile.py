"""Ollama's Modelfile: the prompt format as a Go template, the stop tokens, a safe context.

Ollama renders a template once for each exchange: with `.System` and `.Prompt`, and with `.Response`
where the answer is known; for the last exchange it stops in front of `.Response`. A format fits
into that where every exchange reads the same, which is found out here from what the format itself
renders: texts are cut out of it, none is written by hand.
"""

from phitune.data.conversation import Turn
from phitune.data.prompt import PromptFormat
from phitune.errors import ModelError

MODELFILE = "Modelfile"
_SYSTEM, _PROMPT, _RESPONSE = "\ue000s\ue000", "\ue000p\ue000", "\ue000r\ue000"


def modelfile(
    file: str, prompt_format: PromptFormat, bos_token: str, stops: list[str], context: int
) -> str | None:
    """The whole Modelfile, or None where the format cannot be put as a Go template.

    Args:
        file: name of the model's file, beside this one.
        bos_token: what the tokenizer puts in front of a text by itself, or "": Ollama does it too.
        stops: texts of the tokens that end an answer.
        context: in tokens.
    """
    template = go_template(prompt_format, bos_token)
    if template is None:
        return None
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def go_template(prompt_format: PromptFormat, bos_token: str) -> str | None:
    """A prompt format in Go's template language, as Ollama uses it; None where it does not fit."""
    system, prompt = Turn("system", _SYSTEM), Turn("user", _PROMPT)
    response, again = Turn("assistant", _RESPONSE), Turn("user", _PROMPT)
    before = _text(prompt_format, (prompt,))
    if before is None:
        return None
    start, _, cue = before.removeprefix(bos_token).partition(_PROMPT)
    going_on = _text(prompt_format, (prompt, response, again))
    if going_on is None or not going_on.startswith(before):
        # Single questions are all this format has.
        between = ""
    else:
        answer, _, rest = going_on.removeprefix(before).partition(_RESPONSE)
        # A space of the answer's own comes with what the model answers.
        if answer.strip() or not rest.endswith(start + _PROMPT + cue):
            return None
        between = rest.removesuffix(start + _PROMPT + cue)
    with_system = _text(prompt_format, (system, prompt))
    of_system = ""
    if with_system is not None:
        head, _, tail = with_system.removeprefix(bos_token).partition(_SYSTEM)
        if not tail.endswith(start + _PROMPT + cue):
            return None
        tail = tail.removesuffix(start + _PROMPT + cue)
        of_system = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{tail}{{{{ end }}}}"
    texts = (start, cue, between, of_system)
    if any('"""' in text for text in texts) or any("{{" in text for text in texts[:3]):
        return None
    return (
        f"{of_system}{{{{ if .Prompt }}}}{start}{{{{ .Prompt }}}}{cue}{{{{ end }}}}"
        f"{{{{ .Response }}}}{between}"
    )


def _text(prompt_format: PromptFormat, turns: tuple[Turn, ...]) -> str | None:
    """The conversation as one text, or None where the format has no place for these turns."""
    try:
        return "".join(segment.text for segment in prompt_format.segments(turns))
    except ModelError:
        return None


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
