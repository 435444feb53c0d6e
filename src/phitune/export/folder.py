"""The small files of an exported folder: configuration, tokenizer, template, model card."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from phitune.data.conversation import Turn
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ExportError
from phitune.export.card import CARD_FILE, model_card
from phitune.export.job import Source
from phitune.export.proof import Answered
from phitune.inference.served import trained_format
from phitune.jsonfile import read_object, write_object

GIB = 2**30
# For the small files beside the weights.
_ROOM_TO_SPARE = 32 * 2**20
# Code that loading must not run, and where the base was once loaded from.
_LEFT_OUT = ("auto_map", "custom_pipelines", "_name_or_path", "transformers_version")
_ARCHITECTURES = {"phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def check_room(folder: Path, nbytes: int) -> None:
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
    source.tokenizer.save(folder, source.prompt_format)
    card = model_card(
        format_name,
        source.model_name,
        source.adapter_folder,
        source.tokenizer,
        source.prompt_format,
        source.run,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def check_texts(source: Source, folder: Path, answers: Sequence[Answered]) -> None:
    """An export's tokenizer and template have to put each prompt as training did.

    Raises:
        ExportError: they do not.
    """
    tokenizer = TextTokenizer(folder)
    if tokenizer.chat_template != source.prompt_format.chat_template:
        raise ExportError("the export was removed: its chat template is not that of the adapter")
    form = trained_format(tokenizer, None)
    for answer in answers:
        if tokenizer.encode(form.segments((Turn("user", answer.text),))) != answer.prompt_ids:
            raise ExportError(
                f"the export was removed: its tokenizer encodes this prompt otherwise:"
                f" {answer.text!r}"
            )
    # As servers read it, who know nothing of control tokens.
    stops = read_object(folder / "generation_config.json", "").get("eos_token_id")
    if stops != source.tokenizer.stop_ids(source.prompt_format):
        raise ExportError("the export was removed: its stop tokens are not those of the adapter")
