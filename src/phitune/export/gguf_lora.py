"""`--format gguf-lora`: the adapter alone as a llama.cpp file, for `llama-server --lora`.

llama.cpp scales an adapter by alpha / rank, where alpha is one for the whole file and rank that of
each pair as it is written; whatever else an adapter's scaling is made of goes into B.

Where llama.cpp has one matrix for several modules (Phi-2's q, k, v), their pairs become one of the
sum of their ranks, which is exact: the As stand one above the other, and each B in its own rows and
columns:

    [B_q  0   0 ]   [A_q]
    [ 0  B_k  0 ] * [A_k]
    [ 0   0  B_v]   [A_v]

Proven beside a base written for it in f16, which is removed again.

Shapes: R rank, O out, I in, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phitune.errors import ExportError
from phitune.export.folder import check_room
from phitune.export.gguf_file import ModelFile, require_gguf, write_arrays
from phitune.export.gguf_layout import (
    ARCHITECTURES,
    check_architecture,
    context_note,
    layer_modules,
    safe_context,
)
from phitune.export.gguf_model import add_base, write_card
from phitune.export.gguf_proof import compare_in_llama_cpp, context_for, prove
from phitune.export.gguf_tokenizer import file_tokenizer, name_in_file
from phitune.export.job import Export
from phitune.export.llama_cpp import LlamaCpp, require_llama_cpp
from phitune.export.proof import Proof, greedy_answers, proof_prompts
from phitune.model.architecture import LM_HEAD, ModelConfig
from phitune.model.linear import LoraPair
from phitune.model.lora import Adapter
from phitune.model.targets import EMBEDDING_MODULE

FILE, TEMPLATE_FILE = "adapter.gguf", "chat_template.jinja"
_BASE_TYPE = "f16"


def export(job: Export) -> Proof:
    """Writes the adapter, and has llama.cpp answer with it on a base of f16."""
    source = job.source
    gguf = require_gguf()
    version = require_llama_cpp()
    check_architecture(source.config)
    arrays = lora_arrays(source.config, source.adapter)
    base = ModelFile(source.config, source.model_folder, None, _BASE_TYPE)
    check_room(job.destination, base.nbytes + sum(array.nbytes for _, array in arrays))
    path = job.destination / FILE
    writer = gguf.GGUFWriter(path, ARCHITECTURES[source.config.model_type])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(source.adapter.spec.alpha))
    add_base(writer, source.model_name)
    write_arrays(writer, arrays)
    # The base's file has a template of its own, and an adapter's file cannot hold one.
    template = source.prompt_format.chat_template
    (job.destination / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    names = {"file": FILE, "context": str(safe_context(source.config))}
    write_card(source, job.destination, "gguf-lora", names)
    if note := context_note(source.config):
        job.say(note)

    answers = greedy_answers(job.served, proof_prompts(source.run))
    stop_ids, computed_in = job.served.stop_ids, job.served.decoder.dtype
    job.release()
    tokenizer = file_tokenizer(source.tokenizer, source.prompt_format, source.config.vocab_size)
    whole = job.destination / ".base-f16.gguf"
    name = name_in_file(source.tokenizer, source.model_name)
    base.write(whole, lambda writer: writer.add_name(name), tokenizer, job.progress)
    threads = torch.get_num_threads()
    with LlamaCpp(whole, lora=path, context=context_for(answers), threads=threads) as llama:
        compared = compare_in_llama_cpp(llama, answers, stop_ids)
    whole.unlink()
    measured = {"xllamacpp": version, "base": f"in {_BASE_TYPE}, written for the proof"}
    return prove("gguf-lora", _BASE_TYPE, compared, answers, computed_in, measured)


def lora_arrays(config: ModelConfig, adapter: Adapter) -> list[tuple[str, NDArray[Any]]]:
    """The file's tensors: A [R, I] and B [O, R] of each matrix; of the token table A is [V, R].

    Raises:
        ExportError: an adapter that llama.cpp cannot put on this base.
    """
    if config.tie_word_embeddings and {EMBEDDING_MODULE, LM_HEAD} & adapter.pairs.keys():
        raise ExportError(
            "the base shares its token table with the head, and llama.cpp cannot adapt one of the"
            " two; --format gguf writes the whole model, with both"
        )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    alpha = adapter.spec.alpha
    if pair := adapter.pairs.get(EMBEDDING_MODULE):
        lora_A, lora_B = _scaled(pair, alpha, pair.lora_A.shape[0])
        found["token_embd.weight"] = (lora_A.t(), lora_B)
    for layer in range(config.num_hidden_layers):
        for name, modules in layer_modules(config, layer).items():
            pairs = [adapter.pairs.get(module) for module in modules]
            if any(pair is not None for pair in pairs):
                found[f"{name}.weight"] = _stacked(config, pairs, alpha)
    if pair := adapter.pairs.get(LM_HEAD):
        found["output.weight"] = _scaled(pair, alpha, pair.lora_A.shape[0])
    return [
        (f"{name}.lora_{letter}", np.ascontiguousarray(matrix.float().numpy()))
        for name, matrices in found.items()
        for letter, matrix in zip("ab", matrices, strict=True)
    ]


def _stacked(
    config: ModelConfig, pairs: list[LoraPair | None], alpha: float
) -> tuple[Tensor, Tensor]:
    """The pairs of the modules of one matrix as one pair."""
    there = [pair for pair in pairs if pair is not None]
    rank = sum(pair.lora_A.shape[0] for pair in there)
    if len(pairs) == 1:
        return _scaled(there[0], alpha, rank)
    # Only q, k and v are more than one.
    heights = [config.query_size, config.key_value_size, config.key_value_size]
    lora_B = torch.zeros(sum(heights), rank)
    row = column = 0
    for pair, height in zip(pairs, heights, strict=True):
        if pair is not None:
            _, part = _scaled(pair, alpha, rank)
            lora_B[row : row + height, column : column + part.shape[1]] = part
            column += part.shape[1]
        row += height
    return torch.cat([pair.lora_A.detach().float() for pair in there]), lora_B


def _scaled(pair: LoraPair, alpha: float, rank_in_file: int) -> tuple[Tensor, Tensor]:
    """A and B such that llama.cpp's alpha / rank makes of B what `scaling` makes of ours."""
    factor = pair.scaling * rank_in_file / alpha
    return pair.lora_A.detach().float(), pair.lora_B.detach().float() * factor
