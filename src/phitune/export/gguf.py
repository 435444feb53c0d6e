"""`--format gguf`: the model with the adapter in its weights, for llama.cpp and Ollama."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from phitune.data.dataset import Turn
from phitune.data.prompt import Segment
from phitune.errors import ExportError, listing
from phitune.export.card import CARD_FILE, model_card
from phitune.export.folder import MODELFILE, check_disk_space, modelfile
from phitune.export.formats import DEFAULT, QUANTIZATIONS
from phitune.export.gguf_file import (
    ARCHITECTURES,
    ModelFile,
    check_architecture,
    check_weight_errors,
    context_note,
    layer_modules,
    quantize,
    require_gguf,
    require_tool,
    safe_context,
    weight_errors,
    write_arrays,
)
from phitune.export.gguf_tokenizer import file_tokenizer, name_in_file, stop_tokens
from phitune.export.job import Export, Source
from phitune.export.llama_cpp import LlamaCpp, Step, require_llama_cpp
from phitune.export.proof import TIE, Answered, Proof, greedy_answers, proof_prompts
from phitune.model.architecture import LM_HEAD, ModelConfig
from phitune.model.decoder import LoraPair
from phitune.model.files import is_hub_id
from phitune.model.lora import Adapter
from phitune.model.targets import EMBEDDING_MODULE

if TYPE_CHECKING:
    from gguf import GGUFWriter


# -------------------------------------------------------------------------------------------------
# The proof of a llama.cpp file, through llama.cpp itself.
#
# llama.cpp tells the logarithms of the probabilities of the most probable tokens. It is asked to
# answer each prompt greedily; at a token that differs it is put back on the adapter's answer, so
# that behind a first difference the comparison goes on.
#
# Where weights are rounded to 16 bits the greedy answers have to be the same, except where two
# tokens are so close that rounding decides. llama.cpp also rounds what it multiplies with 16-bit
# weights to 16 bits, and reads Phi-2's gelu from a table of f16 numbers. Quantising to fewer bits
# changes the model: then it is bounded how much less probable the adapter's own answers become.

# Most probable tokens that are compared at each step.
_TOP = 64
# The largest difference of a token's log-probability, as a part of how far apart logits are (their
# standard deviation over the vocabulary). The tiny models, and random ones of 32 layers, are at a
# fifth of it or less, all but bf16 on weights drawn so large that errors grow from layer to layer;
# a wrong scale, rotation or order of heads makes it one and more.
_TOLERANCES = {"f32": 0.05, "f16": 0.1, "bf16": 0.5}
# What tokenizers differ in: spaces, scripts, digits, bytes, special tokens typed as text.
PROBES = (
    "Hello world",
    " leading space",
    "trailing space ",
    "two  spaces   three",
    "tab\tand\t\ttabs",
    "line\nbreak\n\nand\r\nmore\n",
    "\n",
    "    indented = code(1, 2.5)\n        return x[0] // 10",
    "0 12 345 6789 1234567890 3.14159",
    "don't can't we'll I'm they've it's HE'S",
    "Crème brûlée, naïve, Straße, ÅNGSTRÖM",
    "Привет, мир! Καλημέρα",
    "你好、世界。こんにちは 안녕하세요",
    "مرحبا بالعالم שלום हिन्दी বাংলা",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈",
    "a\u00a0b\u200bc\u3000d",
    "<|endoftext|> <|end|> <|user|> </s> <s> <unk> <0x0A>",
    '{"key": [1, null, true], "x": "<a href=\'y\'>"}',
    "!!! ??? ... --- === ### ``` $$$ %%% @@@",
    "CamelCase snake_case kebab-case SCREAMING",
)


@dataclass(frozen=True)
class Compared:
    """llama.cpp beside the adapter in memory, on the adapter's answers."""

    tokens: int
    told: int  # of them, tokens whose probability llama.cpp told
    gaps: tuple[float, ...]  # of each differing token: between the adapter's logits of the two
    first_tokens_differing: int
    largest: float  # difference of a log-probability, among the most probable tokens
    spread: float  # standard deviation of the adapter's logits over the vocabulary
    perplexity: tuple[float, float]  # of the answers: under the adapter, under llama.cpp


def compare_in_llama_cpp(
    llama: LlamaCpp, answers: Sequence[Answered], stop_ids: Sequence[int]
) -> Compared:
    """Asks llama.cpp for every answer.

    Raises:
        ExportError: llama.cpp does not stop where the adapter does, or tells no probabilities.
    """
    tokens = told = first = 0
    gaps: list[float] = []
    spread = largest = ours_total = theirs_total = 0.0
    for answer in answers:
        ours = torch.log_softmax(answer.logits.double(), -1)
        spread += float(answer.logits.std(-1).sum())
        for place, step in enumerate(_forced_steps(llama, answer, stop_ids)):
            expected = answer.answer_ids[place]
            row = ours[place]
            tokens += 1
            for token, logprob in step.logprobs.items():
                largest = _larger(largest, abs(float(row[token]) - logprob))
            theirs = step.logprobs.get(expected)
            if theirs is None and step.logprobs:
                theirs = _logprob(llama, answer, place, expected)
            if theirs is not None:
                ours_total += float(row[expected])
                theirs_total += theirs
                told += 1
            if step.token != expected:
                gaps.append(float(row[expected] - row[step.token]))
                first += place == 0
    if not told:
        raise ExportError("the export was removed: llama.cpp tells no probabilities")
    perplexity = math.exp(-ours_total / told), math.exp(-theirs_total / told)
    return Compared(tokens, told, tuple(gaps), first, largest, spread / tokens, perplexity)


def _forced_steps(llama: LlamaCpp, answer: Answered, stop_ids: Sequence[int]) -> Iterator[Step]:
    """What llama.cpp chooses at each token of an answer; it goes on alone while it is the same."""
    ids = answer.answer_ids
    place = 0
    while place < len(ids):
        # One more than there are: it has to stop by itself.
        steps = llama.greedy([*answer.prompt_ids, *ids[:place]], len(ids) - place + 1, _TOP)
        for number, step in enumerate(steps, start=1):
            yield step
            place += 1
            if step.token != ids[place - 1]:
                break
            if step.token in stop_ids and number < len(steps):
                raise ExportError(
                    "the export was removed: llama.cpp does not stop at the token that ends an"
                    f" answer, {step.token}, after {answer.text!r}"
                )
            if place == len(ids):
                break


def prove(
    format_name: str,
    quantization: str,
    compared: Compared,
    answers: Sequence[Answered],
    computed_in: torch.dtype,
    measured: dict[str, Any],
) -> Proof:
    """The verdict, by what the quantisation allows; see gguf_types.py.

    Args:
        computed_in: what the adapter in memory answered in.
    """
    allowed = QUANTIZATIONS[quantization]
    rise = compared.perplexity[1] / compared.perplexity[0] - 1
    share = _TOLERANCES.get(quantization)
    if share is not None and computed_in == torch.bfloat16:
        share = _TOLERANCES["bf16"]
    tolerance = None if share is None else share * compared.spread
    # What was measured of two logits can turn their order around, as far as it is allowed at all.
    tie_below = TIE if tolerance is None else max(TIE, min(2 * compared.largest, tolerance))
    ties = sum(gap < tie_below for gap in compared.gaps)
    return Proof(
        format_name,
        "the file in llama.cpp, beside the adapter in memory",
        len(answers),
        compared.tokens,
        len(compared.gaps) - ties,
        ties,
        tie_below,
        compared.largest,
        tolerance,
        {
            **measured,
            "quantization": quantization,
            "computed_in": str(computed_in).removeprefix("torch."),
            "logits": f"log-probabilities of the {_TOP} most probable tokens",
            "tokens_with_logits": compared.told,
            "ties_under_0.001": sum(gap < TIE for gap in compared.gaps),
            "first_tokens_differing": compared.first_tokens_differing,
            "perplexity_of_the_answers": compared.perplexity[0],
            "perplexity_in_llama_cpp": compared.perplexity[1],
        },
        perplexity_rise=rise,
        perplexity_tolerance=allowed.perplexity,
    )


def check_tokenizer(llama: LlamaCpp, source: Source, answers: Sequence[Answered]) -> int:
    """Holds llama.cpp's tokenizer and chat template against those the adapter was trained with.

    Returns: how many texts were compared.

    Raises:
        ExportError: they differ, with the texts.
    """
    problems = [
        f"{text!r}: {theirs}, expected {ours}"
        for text in PROBES
        if (theirs := llama.tokenize(text, special=False))
        != (ours := source.coder.tokenizer.encode([Segment(text)]))
    ]
    for answer in answers:
        # As its server puts a question, whose bos_token it then adds when it encodes.
        text = llama.apply_template([{"role": "user", "content": answer.text}])
        expected = source.coder.text((Turn("user", answer.text),))
        bos = source.coder.tokenizer.bos_token
        if text.removeprefix(bos) != expected.removeprefix(bos):
            problems.append(f"the prompt {text!r}, expected {expected!r}")
        elif (theirs := llama.tokenize(expected, special=True)) != answer.prompt_ids:
            problems.append(f"{expected!r}: {theirs}, expected {answer.prompt_ids}")
    if problems:
        raise ExportError(
            "the export was removed: llama.cpp does not put these as training did:\n"
            + listing(problems)
        )
    return len(PROBES) + len(answers)


def context_for(answers: Sequence[Answered]) -> int:
    """A context that the longest answer fits into."""
    return max(len(answer.prompt_ids) + len(answer.answer_ids) for answer in answers) + 8


def _logprob(llama: LlamaCpp, answer: Answered, place: int, token: int) -> float | None:
    """Of a token that was not among the most probable; None where the server does not tell."""
    vocab_size = answer.logits.shape[-1]
    before = [*answer.prompt_ids, *answer.answer_ids[:place]]
    [step] = llama.greedy(before, 1, vocab_size)
    return step.logprobs.get(token)


def _larger(known: float, other: float) -> float:
    """The larger of two; NaN if one is."""
    return known if known >= other or math.isnan(known) else other


# -------------------------------------------------------------------------------------------------

_OLLAMA = "\nollama create my-model -f Modelfile && ollama run my-model"


def export_model(job: Export) -> Proof:
    """Writes the file and the Modelfile beside it, and proves them through llama.cpp."""
    source = job.source
    quantization = job.options.quantization or DEFAULT
    require_gguf()
    version = require_llama_cpp()
    check_architecture(source.config)
    path = job.destination / f"model-{quantization}.gguf"
    tensors = _write(job, path, quantization)
    _write_beside(job, path.name)

    answers = greedy_answers(job.loaded, proof_prompts(source.run))
    stop_ids, computed_in = job.loaded.stop_ids, job.loaded.decoder.dtype
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
    tokenizer = file_tokenizer(source.coder, source.config.vocab_size)
    written = quantization if by_python else DEFAULT
    file = ModelFile(source.config, source.model_folder, source.adapter, written)
    # llama-quantize reads one file and writes another, which is smaller.
    check_disk_space(job.destination, file.nbytes if by_python else 2 * file.nbytes)
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
    writer.add_name(name_in_file(source.coder.tokenizer, source.model_name))
    add_base(writer, source.model_name)
    writer.add_chat_template(source.coder.prompt_format.chat_template)


def add_base(writer: "GGUFWriter", model_name: str) -> None:
    """The base model's name; of a folder of this machine only the last part."""
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, model_name if is_hub_id(model_name) else Path(model_name).name)


def _write_beside(job: Export, file: str) -> None:
    source = job.source
    stops = stop_tokens(source.coder)
    context = safe_context(source.config)
    text = modelfile(
        file, source.coder.prompt_format, source.coder.tokenizer.bos_token, stops, context
    )
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
        source.coder,
        source.run,
        names,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


# -------------------------------------------------------------------------------------------------
# `--format gguf-lora`: the adapter alone as a llama.cpp file, for `llama-server --lora`.
#
# llama.cpp scales an adapter by alpha / rank, where alpha is one for the whole file and rank that
# of each pair as it is written; whatever else an adapter's scaling is made of goes into B.
#
# Where llama.cpp has one matrix for several modules (Phi-2's q, k, v), their pairs become one of
# the sum of their ranks, which is exact: the As stand one above the other, and each B in its own
# rows and columns:
#
#     [B_q  0   0 ]   [A_q]
#     [ 0  B_k  0 ] * [A_k]
#     [ 0   0  B_v]   [A_v]
#
# Proven beside a base written for it in f16, which is removed again.
#
# Shapes: R rank, O out, I in, V vocabulary.

FILE, TEMPLATE_FILE = "adapter.gguf", "chat_template.jinja"
_BASE_TYPE = "f16"


def export_lora(job: Export) -> Proof:
    """Writes the adapter, and has llama.cpp answer with it on a base of f16."""
    source = job.source
    gguf = require_gguf()
    version = require_llama_cpp()
    check_architecture(source.config)
    arrays = lora_arrays(source.config, source.adapter)
    base = ModelFile(source.config, source.model_folder, None, _BASE_TYPE)
    check_disk_space(job.destination, base.nbytes + sum(array.nbytes for _, array in arrays))
    path = job.destination / FILE
    writer = gguf.GGUFWriter(path, ARCHITECTURES[source.config.model_type])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(source.adapter.spec.alpha))
    add_base(writer, source.model_name)
    write_arrays(writer, arrays)
    # The base's file has a template of its own, and an adapter's file cannot hold one.
    template = source.coder.prompt_format.chat_template
    (job.destination / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    names = {"file": FILE, "context": str(safe_context(source.config))}
    write_card(source, job.destination, "gguf-lora", names)
    if note := context_note(source.config):
        job.say(note)

    answers = greedy_answers(job.loaded, proof_prompts(source.run))
    stop_ids, computed_in = job.loaded.stop_ids, job.loaded.decoder.dtype
    job.release()
    tokenizer = file_tokenizer(source.coder, source.config.vocab_size)
    whole = job.destination / ".base-f16.gguf"
    name = name_in_file(source.coder.tokenizer, source.model_name)
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
