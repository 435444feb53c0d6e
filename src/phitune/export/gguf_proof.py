"""The proof of a llama.cpp file, through llama.cpp itself.

llama.cpp tells the logarithms of the probabilities of the most probable tokens. It is asked to
answer each prompt greedily; at a token that differs it is put back on the adapter's answer, so that
behind a first difference the comparison goes on.

Where weights are rounded to 16 bits the greedy answers have to be the same, except where two tokens
are so close that rounding decides. llama.cpp also rounds what it multiplies with 16-bit weights to
16 bits, and reads Phi-2's gelu from a table of f16 numbers. Quantising to fewer bits changes the
model: then it is bounded how much less probable the adapter's own answers become.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phitune.data.conversation import Turn
from phitune.data.prompt import PromptFormat, Segment
from phitune.errors import ExportError, listing
from phitune.export.gguf_types import QUANTIZATIONS
from phitune.export.job import Source
from phitune.export.llama_cpp import LlamaCpp, Step
from phitune.export.proof import TIE, Answered, Proof

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
        != (ours := source.tokenizer.encode([Segment(text)]))
    ]
    for answer in answers:
        # As its server puts a question, whose bos_token it then adds when it encodes.
        text = llama.apply_template([{"role": "user", "content": answer.text}])
        expected = rendered(source.prompt_format, answer.text)
        bos = source.tokenizer.bos_token
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


def rendered(prompt_format: PromptFormat, question: str) -> str:
    """A question as the text that a server makes of it."""
    return "".join(segment.text for segment in prompt_format.segments((Turn("user", question),)))


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
