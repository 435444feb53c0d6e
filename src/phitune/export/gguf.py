"""Exports for llama.cpp: `--format gguf`, a model with a Modelfile for Ollama, and `gguf-lora`.

Both are proven in llama.cpp itself. It answers each prompt of the proof greedily and returns the
log-probabilities of its most probable tokens. Where a token differs, it continues from
the adapter's answer, so that the comparison does not end at a first difference.

Where weights are rounded to 16 bits the greedy answers have to be the same, except where two tokens
are so close that rounding decides. llama.cpp also rounds what it multiplies with 16-bit weights to
16 bits, and reads Phi-2's gelu from a table of f16 numbers. Quantising to fewer bits changes the
model: then it is bounded how much less probable the adapter's own answers become.

Shapes: n tokens of an answer, R rank, O out, I in, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from phitune.data.conversation import Turn
from phitune.data.prompt import PromptFormat, Segment
from phitune.errors import ExportError, ModelError, listing
from phitune.export.card import GgufFile, write_card
from phitune.export.folder import check_disk_space
from phitune.export.formats import DEFAULT_QUANTIZATION, QUANTIZATIONS, ExportSettings
from phitune.export.gguf_file import (
    FileAbout,
    ModelFile,
    add_base,
    check_architecture,
    check_weight_errors,
    context_note,
    quantize,
    require_gguf,
    require_tool,
    safe_context,
    weight_errors,
    write_arrays,
)
from phitune.export.gguf_tokenizer import file_tokenizer, name_in_file, stop_tokens
from phitune.export.llama_cpp import LlamaCpp, Step, require_llama_cpp
from phitune.export.proof import TIE, Proof, Reference, proof_prompts, reference_answers
from phitune.export.source import Source
from phitune.model.architecture import EMBEDDING_MODULE, LM_HEAD, ModelConfig
from phitune.model.decoder import LoraPair
from phitune.model.gguf_names import ARCHITECTURES, layer_modules
from phitune.model.lora import Adapter
from phitune.text import plural

# --- the whole model ------------------------------------------------------------------------------


def export_gguf(
    source: Source, folder: Path, settings: ExportSettings, progress: Callable[[int, int], None]
) -> Proof:
    """Writes the file and the Modelfile beside it, and proves the file in llama.cpp.

    Args:
        progress: called with (bytes written, bytes in all) after each tensor.
    """
    require_gguf()
    version = require_llama_cpp()
    check_architecture(source.config)
    quantization = settings.quantization
    path = folder / f"model-{quantization}.gguf"
    file = _write_model(source, path, quantization, progress)
    notes = []
    if kept := file.kept_in_f16:
        notes.append(
            f"note: {plural(len(kept), 'tensor')} kept in f16, of rows that are no whole number of"
            f" blocks of {quantization}: {', '.join(kept[:3])}{' ...' if len(kept) > 3 else ''}"
        )
    notes += _write_beside(source, path)

    memory = _answers_in_memory(source, settings)
    errors = weight_errors(path, file.tensors)
    check_weight_errors(errors, QUANTIZATIONS[quantization].weight_error)
    with LlamaCpp(path, context=memory.context, threads=torch.get_num_threads()) as llama:
        texts = check_tokenizer(llama, source, memory.references)
        difference = compare_in_llama_cpp(llama, memory.references, memory.stop_ids)
    measured = {
        "xllamacpp": version,
        "texts_tokenized_the_same": texts,
        "largest_relative_weight_error": max(errors.values()),
        "tensors_kept_in_f16": kept,
        "context_safe_for_llama_cpp": safe_context(source.config),
    }
    return _proof(settings.format, quantization, memory, difference, measured, notes)


def _write_model(
    source: Source, path: Path, quantization: str, progress: Callable[[int, int], None]
) -> ModelFile:
    by_python = QUANTIZATIONS[quantization].python
    tool = "" if by_python else require_tool(quantization, source.adapter_folder)
    tokenizer = file_tokenizer(source.coder, source.config.vocab_size)
    written = quantization if by_python else DEFAULT_QUANTIZATION
    file = ModelFile(source.config, source.model_folder, source.adapter, written)
    # llama-quantize reads one file and writes another, which is smaller.
    check_disk_space(path.parent, file.nbytes if by_python else 2 * file.nbytes)
    whole = path if by_python else path.with_name(f".whole-{written}.gguf")
    name = name_in_file(source.coder.tokenizer, source.model_name)
    about = FileAbout(name, source.model_name, source.coder.prompt_format.chat_template)
    file.write(whole, about, tokenizer, progress)
    if not by_python:
        quantize(tool, whole, path, quantization, psutil.cpu_count(logical=False) or 1)
        whole.unlink()
    return file


def _write_beside(source: Source, path: Path) -> list[str]:
    """Writes Modelfile and card. Returns: notes for the user."""
    notes = []
    coder, stops = source.coder, stop_tokens(source.coder)
    context = safe_context(source.config)
    text = modelfile(path.name, coder.prompt_format, coder.tokenizer.bos_token, stops, context)
    if text is None:
        notes.append(
            "note: no Modelfile was written: this chat template does not fit an Ollama template"
            " (each exchange has to read the same); llama.cpp's server takes it as it is"
        )
    else:
        (path.parent / MODELFILE).write_text(text, encoding="utf-8")
    if note := context_note(source.config):
        notes.append(note)
    file = GgufFile(path.name, context, ollama=text is not None)
    write_card(source, path.parent, "gguf", file)
    return notes


# --- Ollama's Modelfile ---------------------------------------------------------------------------
#
# The prompt format as a Go template, the stop tokens, a safe context.
#
# Ollama renders a template once for each exchange: with `.System` and `.Prompt`, and with
# `.Response` where the answer is known; for the last exchange it stops before `.Response`. A format
# fits where every exchange reads the same. That is found out from what the format itself renders:
# its texts are taken from there, none is written by hand.

MODELFILE = "Modelfile"
# Contents that no format contains; what it renders around them is its own text.
_SYSTEM, _PROMPT, _RESPONSE = "\ue000s\ue000", "\ue000p\ue000", "\ue000r\ue000"


def modelfile(
    file: str, prompt_format: PromptFormat, bos_token: str, stops: list[str], context: int
) -> str | None:
    """The whole Modelfile, or None where the format does not fit a Go template.

    Args:
        file: name of the model's file, beside this one.
        bos_token: what the tokenizer puts before a text by itself, or "": Ollama does it too.
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
    response = Turn("assistant", _RESPONSE)
    # One question: START prompt CUE
    question = _rendered(prompt_format, (prompt,))
    if question is None:
        return None
    start, _, cue = question.removeprefix(bos_token).partition(_PROMPT)
    exchange = start + _PROMPT + cue

    # A second question: what stands BETWEEN an answer and the question after it.
    between = ""  # where the format has single questions only
    conversation = _rendered(prompt_format, (prompt, response, prompt))
    if conversation is not None and conversation.startswith(question):
        answer, _, rest = conversation.removeprefix(question).partition(_RESPONSE)
        # A space before the answer is generated by the model, as part of the answer.
        if answer.strip() or not rest.endswith(exchange):
            return None
        between = rest.removesuffix(exchange)

    # A system turn: HEAD system TAIL, before the question.
    of_system = head = tail = ""
    with_system = _rendered(prompt_format, (system, prompt))
    if with_system is not None:
        head, _, tail = with_system.removeprefix(bos_token).partition(_SYSTEM)
        if not tail.endswith(exchange):
            return None
        tail = tail.removesuffix(exchange)
        of_system = "{{ if .System }}" + head + "{{ .System }}" + tail + "{{ end }}"

    # Texts that would end the template, or be read as a part of it.
    texts = (start, cue, between, head, tail)
    if any(mark in text for text in texts for mark in ('"""', "{{")):
        return None
    of_prompt = "{{ if .Prompt }}" + start + "{{ .Prompt }}" + cue + "{{ end }}"
    return of_system + of_prompt + "{{ .Response }}" + between


def _rendered(prompt_format: PromptFormat, turns: tuple[Turn, ...]) -> str | None:
    """The conversation as one text, or None where the format has no place for these turns."""
    try:
        return "".join(segment.text for segment in prompt_format.segments(turns))
    except ModelError:
        return None


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


# --- the adapter alone ----------------------------------------------------------------------------

# llama.cpp scales an adapter by alpha / rank, where alpha is one for the whole file and rank that
# of each pair as it is written; whatever else an adapter's scaling consists of goes into B.
#
# Where llama.cpp has one matrix for several modules (Phi-2's q, k, v), their pairs become one with
# the sum of their ranks, which is exact: the As stand one above the other, and each B in its own
# rows and columns:
#
#     [B_q  0   0 ]   [A_q]
#     [ 0  B_k  0 ] * [A_k]
#     [ 0   0  B_v]   [A_v]

FILE, TEMPLATE_FILE = "adapter.gguf", "chat_template.jinja"
_BASE_TYPE = "f16"


def export_gguf_lora(
    source: Source, folder: Path, settings: ExportSettings, progress: Callable[[int, int], None]
) -> Proof:
    """Writes the adapter, and proves it in llama.cpp on a base in f16 that is removed again.

    Args:
        progress: called with (bytes written, bytes in all) after each tensor of the base.
    """
    gguf = require_gguf()
    version = require_llama_cpp()
    check_architecture(source.config)
    arrays = lora_arrays(source.config, source.adapter)
    base = ModelFile(source.config, source.model_folder, None, _BASE_TYPE)
    check_disk_space(folder, base.nbytes + sum(array.nbytes for _, array in arrays))

    path = folder / FILE
    writer = gguf.GGUFWriter(path, ARCHITECTURES[source.config.model_type])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(source.adapter.spec.alpha))
    add_base(writer, source.model_name)
    write_arrays(writer, arrays)
    # The base's file has a template of its own, and an adapter's file cannot hold one.
    template = source.coder.prompt_format.chat_template
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    write_card(source, folder, "gguf-lora", GgufFile(FILE, safe_context(source.config)))
    note = context_note(source.config)

    memory = _answers_in_memory(source, settings)
    whole = folder / ".base-f16.gguf"
    about = FileAbout(name_in_file(source.coder.tokenizer, source.model_name))
    tokenizer = file_tokenizer(source.coder, source.config.vocab_size)
    base.write(whole, about, tokenizer, progress)
    threads = torch.get_num_threads()
    with LlamaCpp(whole, lora=path, context=memory.context, threads=threads) as llama:
        difference = compare_in_llama_cpp(llama, memory.references, memory.stop_ids)
    whole.unlink()
    measured = {"xllamacpp": version, "base": f"in {_BASE_TYPE}, written for the proof"}
    return _proof(settings.format, _BASE_TYPE, memory, difference, measured, [note] if note else [])


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
        lora_A, lora_B = _scaled(pair, alpha, pair.lora_A.shape[0])  # [R, V], [O, R]
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
    """The pairs of the modules of one matrix as one: A [sum of R, I], B [O, sum of R]."""
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
            _, part = _scaled(pair, alpha, rank)  # [height, R]
            lora_B[row : row + height, column : column + part.shape[1]] = part
            column += part.shape[1]
        row += height
    return torch.cat([pair.lora_A.detach().float() for pair in there]), lora_B


def _scaled(pair: LoraPair, alpha: float, rank_in_file: int) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] such that llama.cpp's alpha / rank makes of B what `scaling` does."""
    factor = pair.scaling * rank_in_file / alpha
    return pair.lora_A.detach().float(), pair.lora_B.detach().float() * factor


# --- the proof in llama.cpp -----------------------------------------------------------------------

# Most probable tokens that are compared at each step.
_TOP = 64
# The largest difference of a token's log-probability, as a share of how far apart logits are (their
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
class _InMemory:
    """The answers of the adapter in memory, whose model has been let go of."""

    references: list[Reference]
    stop_ids: list[int]
    dtype: torch.dtype  # that they were computed in

    @property
    def context(self) -> int:
        """A context, in tokens, that the longest answer fits into."""
        lengths = (len(one.prompt_ids) + one.answer.tokens for one in self.references)
        return max(lengths) + 8


@dataclass(frozen=True)
class LlamaCppDifference:
    """llama.cpp beside the adapter in memory, on the adapter's answers."""

    tokens: int
    tokens_with_logprobs: int  # of them; llama.cpp returns none in the middle of a letter
    gaps: tuple[float, ...]  # of each differing token: between the adapter's logits of the two
    first_tokens_differing: int
    largest: float  # difference of a log-probability, among the most probable tokens
    spread: float  # standard deviation of the adapter's logits over the vocabulary
    perplexity: float  # of the answers, under the adapter
    perplexity_in_llama_cpp: float


def _answers_in_memory(source: Source, settings: ExportSettings) -> _InMemory:
    loaded = source.load(settings.device, settings.precision)
    references = reference_answers(loaded, proof_prompts(source.run))
    stop_ids = loaded.coder(loaded.first_choice).stop_ids
    return _InMemory(references, stop_ids, loaded.decoder.dtype)


def _proof(
    format_name: str,
    quantization: str,
    memory: _InMemory,
    difference: LlamaCppDifference,
    measured: Mapping[str, Any],
    notes: Sequence[str],
) -> Proof:
    """The verdict, by what the quantisation allows; see formats.py."""
    share = _TOLERANCES.get(quantization)
    if share is not None and memory.dtype == torch.bfloat16:
        share = _TOLERANCES["bf16"]
    tolerance = None if share is None else share * difference.spread
    # The measured difference of two logits can change their order, as far as it is allowed at all.
    tie_below = TIE if tolerance is None else max(TIE, min(2 * difference.largest, tolerance))
    ties = sum(gap < tie_below for gap in difference.gaps)
    return Proof(
        format=format_name,
        compared="the file in llama.cpp, beside the adapter in memory",
        prompts=len(memory.references),
        tokens=difference.tokens,
        tokens_differing=len(difference.gaps) - ties,
        ties_excused=ties,
        tie_below=tie_below,
        largest_logit_difference=difference.largest,
        tolerance=tolerance,
        measured={
            **measured,
            "quantization": quantization,
            "computed_in": str(memory.dtype).removeprefix("torch."),
            "logits": f"log-probabilities of the {_TOP} most probable tokens",
            "tokens_with_logits": difference.tokens_with_logprobs,
            "ties_under_0.001": sum(gap < TIE for gap in difference.gaps),
            "first_tokens_differing": difference.first_tokens_differing,
            "perplexity_of_the_answers": difference.perplexity,
            "perplexity_in_llama_cpp": difference.perplexity_in_llama_cpp,
        },
        perplexity_rise=difference.perplexity_in_llama_cpp / difference.perplexity - 1,
        perplexity_tolerance=QUANTIZATIONS[quantization].perplexity,
        notes=tuple(notes),
    )


def compare_in_llama_cpp(
    llama: LlamaCpp, references: Sequence[Reference], stop_ids: Sequence[int]
) -> LlamaCppDifference:
    """Lets llama.cpp answer every prompt, and compares it token by token.

    Raises:
        ExportError: llama.cpp does not stop where the adapter does, or returns no probabilities.
    """
    tokens = with_logprobs = first = 0
    gaps: list[float] = []
    spread = largest = ours_total = theirs_total = 0.0
    for reference in references:
        ours = torch.log_softmax(reference.logits.double(), -1)  # [n, V]
        spread += float(reference.logits.std(-1).sum())
        for place, step in enumerate(_forced_steps(llama, reference, stop_ids)):
            expected = reference.answer.ids[place]
            row = ours[place]  # [V]
            tokens += 1
            for token, logprob in step.logprobs.items():
                largest = _larger(largest, abs(float(row[token]) - logprob))
            theirs = step.logprobs.get(expected)
            if theirs is None and step.logprobs:
                theirs = _logprob(llama, reference, place)
            if theirs is not None:
                ours_total += float(row[expected])
                theirs_total += theirs
                with_logprobs += 1
            if step.token != expected:
                gaps.append(float(row[expected] - row[step.token]))
                first += place == 0
    if not with_logprobs:
        raise ExportError("the export was removed: llama.cpp returned no probabilities")
    return LlamaCppDifference(
        tokens=tokens,
        tokens_with_logprobs=with_logprobs,
        gaps=tuple(gaps),
        first_tokens_differing=first,
        largest=largest,
        spread=spread / tokens,
        perplexity=math.exp(-ours_total / with_logprobs),
        perplexity_in_llama_cpp=math.exp(-theirs_total / with_logprobs),
    )


def _forced_steps(llama: LlamaCpp, reference: Reference, stop_ids: Sequence[int]) -> Iterator[Step]:
    """What llama.cpp chooses at each token of an answer; it generates freely while it is equal."""
    ids = reference.answer.ids
    place = 0
    while place < len(ids):
        # One more than there are: it has to stop by itself.
        steps = llama.greedy([*reference.prompt_ids, *ids[:place]], len(ids) - place + 1, _TOP)
        for number, step in enumerate(steps, start=1):
            yield step
            place += 1
            if step.token != ids[place - 1]:
                break
            if step.token in stop_ids and number < len(steps):
                raise ExportError(
                    "the export was removed: llama.cpp does not stop at the token that ends an"
                    f" answer, {step.token}, after {reference.prompt!r}"
                )
            if place == len(ids):
                break


def _logprob(llama: LlamaCpp, reference: Reference, place: int) -> float | None:
    """Of a token of the answer that was not among the most probable; None where there is none."""
    vocab_size = reference.logits.shape[-1]
    before = [*reference.prompt_ids, *reference.answer.ids[:place]]
    [step] = llama.greedy(before, 1, vocab_size)
    return step.logprobs.get(reference.answer.ids[place])


def _larger(known: float, other: float) -> float:
    """The larger of two; NaN if one is."""
    return known if known >= other or math.isnan(known) else other


def check_tokenizer(llama: LlamaCpp, source: Source, references: Sequence[Reference]) -> int:
    """Compares llama.cpp's tokenizer and chat template with those of training.

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
    for reference in references:
        # As its server puts a question; it adds its bos_token when it encodes.
        text = llama.apply_template([{"role": "user", "content": reference.prompt}])
        expected = source.coder.text((Turn("user", reference.prompt),))
        bos = source.coder.tokenizer.bos_token
        if text.removeprefix(bos) != expected.removeprefix(bos):
            problems.append(f"the prompt {text!r}, expected {expected!r}")
        elif (theirs := llama.tokenize(expected, special=True)) != reference.prompt_ids:
            problems.append(f"{expected!r}: {theirs}, expected {reference.prompt_ids}")
    if problems:
        raise ExportError(
            "the export was removed: llama.cpp does not encode these as training did:\n"
            + listing(problems)
        )
    return len(PROBES) + len(references)
