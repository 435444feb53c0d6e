"""`--format gguf`: the model with the adapter in its weights, for llama.cpp and Ollama."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from phitune.export.card import CARD_FILE, model_card
from phitune.export.folder import check_room
from phitune.export.gguf_file import ModelFile, require_gguf
from phitune.export.gguf_layout import (
    check_architecture,
    context_note,
    safe_context,
)
from phitune.export.gguf_proof import check_tokenizer, compare_in_llama_cpp, context_for, prove
from phitune.export.gguf_tokenizer import file_tokenizer, name_in_file, stop_tokens
from phitune.export.gguf_types import DEFAULT, QUANTIZATIONS
from phitune.export.gguf_weights import check_weight_errors, weight_errors
from phitune.export.job import Export, Source
from phitune.export.llama_cpp import LlamaCpp, require_llama_cpp
from phitune.export.llama_quantize import quantize, require_tool
from phitune.export.modelfile import MODELFILE, modelfile
from phitune.export.proof import Proof, greedy_answers, proof_prompts
from phitune.model.files import is_hub_id

if TYPE_CHECKING:
    from gguf import GGUFWriter

_OLLAMA = "\nollama create my-model -f Modelfile && ollama run my-model"


def export(job: Export) -> Proof:
    """Writes the file and the Modelfile beside it, and proves them through llama.cpp."""
    source = job.source
    quantization = job.options.quantization or DEFAULT
    require_gguf()
    version = require_llama_cpp()
    check_architecture(source.config)
    path = job.destination / f"model-{quantization}.gguf"
    tensors = _write(job, path, quantization)
    _write_beside(job, path.name)

    answers = greedy_answers(job.served, proof_prompts(source.run))
    stop_ids, computed_in = job.served.stop_ids, job.served.decoder.dtype
    job.release()
    errors = weight_errors(path, tensors.tensors)
    check_weight_errors(errors, QUANTIZATIONS[quantization].weight_error)
    with LlamaCpp(path, context=context_for(answers), threads=torch.get_num_threads()) as llama:
        texts = check_tokenizer(llama, source, answers)
        compared = compare_in_llama_cpp(llama, answers, stop_ids)
    measured = {
        "xllamacpp": version,
        "texts_tokenized_the_same": texts,
        "largest_relative_weight_error": max(errors.values()),
        "tensors_kept_in_f16": tensors.kept_in_f16,
        "context_safe_for_llama_cpp": safe_context(source.config),
    }
    return prove("gguf", quantization, compared, answers, computed_in, measured)


def _write(job: Export, path: Path, quantization: str) -> ModelFile:
    source = job.source
    by_python = QUANTIZATIONS[quantization].python
    tool = "" if by_python else require_tool(quantization, source.adapter_folder)
    tokenizer = file_tokenizer(source.tokenizer, source.prompt_format, source.config.vocab_size)
    written = quantization if by_python else DEFAULT
    file = ModelFile(source.config, source.model_folder, source.adapter, written)
    # llama-quantize reads one file and writes another, which is smaller.
    check_room(job.destination, file.nbytes if by_python else 2 * file.nbytes)
    if kept := file.kept_in_f16:
        job.say(
            f"note: {len(kept)} tensors stay in f16, their rows are no whole number of blocks of"
            f" {quantization}: {', '.join(kept[:3])}{' ...' if len(kept) > 3 else ''}"
        )
    whole = path if by_python else path.with_name(f".whole-{written}.gguf")
    file.write(whole, lambda writer: _about(writer, source), tokenizer, job.progress)
    if not by_python:
        quantize(tool, whole, path, quantization, psutil.cpu_count(logical=False) or 1)
        whole.unlink()
    return file


def _about(writer: "GGUFWriter", source: Source) -> None:
    writer.add_type("model")
    writer.add_name(name_in_file(source.tokenizer, source.model_name))
    add_base(writer, source.model_name)
    writer.add_chat_template(source.prompt_format.chat_template)


def add_base(writer: "GGUFWriter", model_name: str) -> None:
    """The base model's name; of a folder of this machine only the last part."""
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, model_name if is_hub_id(model_name) else Path(model_name).name)


def _write_beside(job: Export, file: str) -> None:
    source = job.source
    stops = stop_tokens(source.tokenizer, source.prompt_format)
    context = safe_context(source.config)
    text = modelfile(file, source.prompt_format, source.tokenizer.bos_token, stops, context)
    if text is None:
        job.say(
            "note: no Modelfile was written: this chat template cannot be put as an Ollama template"
            " (each exchange has to read the same); llama.cpp's server takes it as it is"
        )
    else:
        (job.destination / MODELFILE).write_text(text, encoding="utf-8")
    if note := context_note(source.config):
        job.say(note)
    write_card(
        source,
        job.destination,
        "gguf",
        {"file": file, "context": str(context), "ollama": _OLLAMA if text else ""},
    )


def write_card(source: Source, folder: Path, format_name: str, names: Mapping[str, str]) -> None:
    card = model_card(
        format_name,
        source.model_name,
        source.adapter_folder,
        source.tokenizer,
        source.prompt_format,
        source.run,
        names,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
