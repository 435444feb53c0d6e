"""The small files of an exported folder: configuration, tokenizer, template, model card."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from phitune.data.coder import Coder
from phitune.data.dataset import Turn
from phitune.data.prompt import PromptFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ExportError, ModelError
from phitune.export.card import CARD_FILE, model_card
from phitune.export.job import Source
from phitune.export.proof import Answered
from phitune.untrusted import read_object, write_object

# -------------------------------------------------------------------------------------------------
# Ollama's Modelfile: the prompt format as a Go template, the stop tokens, a safe context.
#
# Ollama renders a template once for each exchange: with `.System` and `.Prompt`, and with
# `.Response` where the answer is known; for the last exchange it stops in front of `.Response`. A
# format fits into that where every exchange reads the same, which is found out here from what the
# format itself renders: texts are cut out of it, none is written by hand.

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


# -------------------------------------------------------------------------------------------------

GIB = 2**30
# For the small files beside the weights.
_ROOM_TO_SPARE = 32 * 2**20
# Code that loading must not run, and where the base was once loaded from.
_LEFT_OUT = ("auto_map", "custom_pipelines", "_name_or_path", "transformers_version")
_ARCHITECTURES = {"phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def check_disk_space(folder: Path, nbytes: int) -> None:
    """Refuses an export that the disk has no room for, before it is written.

    Raises:
        ExportError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if nbytes + _ROOM_TO_SPARE > free:
        raise ExportError(
            f"{folder.parent}: the export takes {nbytes / GIB:.2f} GiB and the disk has"
            f" {free / GIB:.2f} GiB left; make room, or choose another --output_dir"
        )


def write_config(source: Source, folder: Path, dtype: torch.dtype | None, *, untied: bool) -> None:
    """The base's config.json, as far as it is still true, without remote code.

    Args:
        dtype: of the weights, if not that of the base.
    """
    raw = read_object(source.model_folder / "config.json", "is this a model folder?")
    config = {name: value for name, value in raw.items() if name not in _LEFT_OUT}
    config.setdefault("architectures", [_ARCHITECTURES[source.config.model_type]])
    if dtype is not None:
        spelling = "dtype" if "dtype" in config else "torch_dtype"
        config[spelling] = _DTYPE_NAMES[dtype]
    if untied:
        config["tie_word_embeddings"] = False
    write_object(folder / "config.json", config)


def write_texts(source: Source, folder: Path, format_name: str) -> None:
    """Tokenizer, chat template, generation_config.json with the stop ids, and the model card."""
    source.coder.save(folder)
    card = model_card(
        format_name,
        source.model_name,
        source.adapter_folder,
        source.coder,
        source.run,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def check_texts(source: Source, folder: Path, answers: Sequence[Answered]) -> None:
    """An export's tokenizer and template have to put each prompt as training did.

    Raises:
        ExportError: they do not.
    """
    tokenizer = TextTokenizer(folder)
    if tokenizer.chat_template != source.coder.prompt_format.chat_template:
        raise ExportError("the export was removed: its chat template is not that of the adapter")
    coder = Coder.as_saved(tokenizer)
    for answer in answers:
        if coder.encode((Turn("user", answer.text),)) != answer.prompt_ids:
            raise ExportError(
                f"the export was removed: its tokenizer encodes this prompt otherwise:"
                f" {answer.text!r}"
            )
    # As servers read it, who know nothing of control tokens.
    stops = read_object(folder / "generation_config.json", "").get("eos_token_id")
    if stops != source.coder.stop_ids:
        raise ExportError("the export was removed: its stop tokens are not those of the adapter")
