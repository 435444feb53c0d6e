"""The proof of an export: its answers beside those of the adapter in memory.

The adapter in memory answers fixed prompts greedily. The export then computes its most probable
token at every place of these answers. Where that is the token of the answer everywhere, its own
greedy answer is the same; after a first difference the comparison continues.

Not here: how an export is loaded and what its format allows; see the modules of the formats.

Shapes: n tokens of an answer, V vocabulary, T packed tokens, D hidden.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phitune.data.conversation import Turn
from phitune.inference.loaded import Answer, LoadedModel
from phitune.model.decoder import Decoder
from phitune.training.rundir import SAMPLES
from phitune.untrusted import write_object

PROOF_FILE = "export_proof.json"
# Two tokens are a tie where their logits differ by less than this.
TIE = 1e-3
# The largest difference of a logit in fp32 where no weight is rounded: the first number, or this
# share of the largest logit where that is more (sums of a deep model are rounded in other orders).
FP32_TOLERANCE, FP32_RELATIVE_TOLERANCE = 1e-4, 1e-5


@dataclass(frozen=True)
class Proof:
    """What was compared, and how far apart it was."""

    format: str  # that was written
    compared: str  # what with what, in words
    prompts: int  # that were answered
    tokens: int  # greedy tokens compared
    tokens_differing: int  # without ties
    ties_excused: int  # differing tokens whose logits are closer than `tie_below`
    tie_below: float  # see there
    largest_logit_difference: float | None  # None where the other side has no logits
    tolerance: float | None  # of that difference
    measured: Mapping[str, Any] = field(default_factory=dict)  # what only this format measures
    typical_logit_difference: float | None = None  # the root of the mean square
    typical_tolerance: float | None = None  # of that
    # Of the adapter's answers, as a share. Where it has a tolerance single tokens are not judged: a
    # quantised model is another model, and may answer with other words.
    perplexity_rise: float | None = None
    perplexity_tolerance: float | None = None  # of that
    notes: tuple[str, ...] = ()  # for the user; not in the file

    @property
    def passed(self) -> bool:
        """Whether every tolerance is kept, and every token is equal where tokens are judged."""
        pairs = (
            (self.largest_logit_difference, self.tolerance),
            (self.typical_logit_difference, self.typical_tolerance),
            (self.perplexity_rise, self.perplexity_tolerance),
        )
        same = not self.tokens_differing or self.perplexity_tolerance is not None
        return same and all(
            difference <= tolerance  # False for NaN.
            for difference, tolerance in pairs
            if difference is not None and tolerance is not None
        )

    def sentence(self) -> str:
        """For people, in one line."""
        said = f"{self.tokens - self.tokens_differing - self.ties_excused} of {self.tokens}"
        said += f" greedy tokens equal on {self.prompts} prompts"
        if self.ties_excused:
            said += f" ({self.ties_excused} ties under {self.tie_below:.2g} excused)"
        if self.largest_logit_difference is not None:
            said += f", largest logit difference {self.largest_logit_difference:.2g}"
            if self.tolerance is not None:
                said += f" (tolerance {self.tolerance:.2g})"
        if self.typical_logit_difference is not None and self.typical_tolerance is not None:
            said += f", typically {self.typical_logit_difference:.2g}"
            said += f" (tolerance {self.typical_tolerance:.2g})"
        if self.perplexity_rise is not None and self.perplexity_tolerance is not None:
            said += f", perplexity of the answers {self.perplexity_rise:+.2%}"
            said += f" (tolerance {self.perplexity_tolerance:+.0%})"
        return said


_PIECE = 2**20  # bytes


def file_digest(path: Path, digest: "hashlib._Hash") -> str:
    """The hash of a file's content, in hexadecimal, a piece at a time."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def write_proof(folder: Path, proof: Proof, about: Mapping[str, Any]) -> None:
    """Writes export_proof.json: the proof, what it is about, and the files of the export.

    Their hashes tell later whether they are still the files that were proven.
    """
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files = {name: path.stat().st_size for name, path in paths.items()}
    hashes = {name: file_digest(path, hashlib.sha256()) for name, path in paths.items()}
    figures = {key: value for key, value in vars(proof).items() if key not in ("measured", "notes")}
    content = {**about, **figures, **proof.measured, "passed": proof.passed, "files": files}
    content["sha256"] = hashes
    write_object(folder / PROOF_FILE, content)


# --- prompts --------------------------------------------------------------------------------------

# Short questions of many kinds, the same for all models.
PROMPTS = (
    "What is the capital of France?",
    "How much is 17 plus 25?",
    "Name three things that are yellow.",
    "Write a short poem about rain.",
    "What does a baker do?",
    "Explain in one sentence why the sky is blue.",
    "Translate 'good morning' into German.",
    "Write a Python function that reverses a list.",
    "What is the opposite of hot?",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "¿Cuántos días tiene una semana?",
    'Is this JSON valid? {"a": [1, 2, 3], "b": null}',
    "Hello",
    "Summarise: The ship left at dawn. The sea was calm, and by noon no land was in sight.",
)
_RUN_PROMPTS = 8


def proof_prompts(run: Path | None) -> list[str]:
    """The shipped prompts, and some of those that the samples of a run answered."""
    asked = _sample_prompts(run / SAMPLES) if run and (run / SAMPLES).is_file() else []
    others = [prompt for prompt in dict.fromkeys(asked) if prompt not in PROMPTS]
    return [*PROMPTS, *others[:_RUN_PROMPTS]]


def _sample_prompts(samples: Path) -> Iterator[str]:
    with samples.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):  # The half line of a killed run.
                continue
            if isinstance(prompt, str):
                yield prompt


# --- answers --------------------------------------------------------------------------------------

MAX_NEW_TOKENS = 24
_BATCH = 8  # prompts that are computed together


@dataclass(frozen=True)
class Reference:
    """A greedy answer of the adapter in memory, and the logits it was chosen from."""

    prompt: str
    prompt_ids: list[int]
    answer: Answer  # of n tokens
    logits: Tensor  # [n, V] in fp32, on the CPU


def reference_answers(
    loaded: LoadedModel, prompts: Sequence[str], choice: int | None = 0
) -> list[Reference]:
    """The answers of a model in memory, each prompt as a question in its format.

    Args:
        choice: an adapter's number, or None for the base.
    """
    ids = [loaded.coder(choice).encode((Turn("user", prompt),)) for prompt in prompts]
    answers = loaded.answers(ids, [choice] * len(ids), max_new_tokens=MAX_NEW_TOKENS)
    loaded.on_decoder.choose([choice])
    logits = forced_logits(loaded.decoder, ids, [answer.ids for answer in answers])
    return list(map(Reference, prompts, ids, answers, logits))


@torch.inference_mode()
def forced_logits(
    decoder: Decoder, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The logits from which a decoder would choose each token of each answer.

    Args:
        decoder: computes with the adapter that was chosen on it.
        prompts, answers: ids.

    Returns: for each answer [n, V], in fp32, on the CPU.
    """
    found = []
    # Several prompts at once: for a few tokens, reading the weights takes longer than the products.
    for start in range(0, len(prompts), _BATCH):
        pairs = list(zip(prompts, answers, strict=True))[start : start + _BATCH]
        rows = [[*prompt, *answer[:-1]] for prompt, answer in pairs]
        ends = [0, *itertools.accumulate(map(len, rows))]
        ids = torch.tensor([token for row in rows for token in row], device=decoder.device)  # [T]
        positions = torch.cat([torch.arange(len(row)) for row in rows]).to(decoder.device)  # [T]
        hidden = decoder(ids, positions, ends)  # [T, D]
        for (prompt, _), first, stop in zip(pairs, ends, ends[1:], strict=False):
            logits = decoder.logits(hidden[first + len(prompt) - 1 : stop])  # [n, V]
            found.append(logits.float().cpu())
    return found


# --- comparison -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitDifference:
    """How far apart the logits of two models are on the same answers."""

    tokens: int
    differing: int  # most probable tokens that differ, without ties
    ties: int
    largest: float
    typical: float  # the root of the mean square


def difference_on(
    decoder: Decoder, references: Sequence[Reference], tie_below: float
) -> LogitDifference:
    """Compares the adapter in memory with a decoder; see `logit_difference`."""
    prompts = [reference.prompt_ids for reference in references]
    answers = [reference.answer.ids for reference in references]
    return logit_difference(references, forced_logits(decoder, prompts, answers), tie_below)


def logit_difference(
    references: Sequence[Reference], logits: Sequence[Tensor], tie_below: float
) -> LogitDifference:
    """Compares the adapter in memory with another model, on the adapter's answers.

    Args:
        logits: of the other model on the same answers, for each [n, V].
        tie_below: a differing token is a tie where the adapter's logits of the two are closer.
    """
    tokens = differing = ties = 0
    largest, squares, count = torch.zeros(()), 0.0, 0
    for reference, theirs in zip(references, logits, strict=True):
        ours = reference.logits  # [n, V]
        # Not max() of Python: it would forget NaN, which then has to be the result.
        largest = torch.maximum(largest, (ours - theirs).abs().max())
        squares += float((ours - theirs).double().pow(2).sum())
        count += ours.numel()
        chosen, other = ours.argmax(-1, keepdim=True), theirs.argmax(-1, keepdim=True)  # [n, 1]
        gap = ours.gather(-1, chosen) - ours.gather(-1, other)  # [n, 1]
        differs = chosen != other
        close = differs & (gap < tie_below)
        tokens += len(chosen)
        ties += int(close.sum())
        differing += int(differs.sum() - close.sum())
    return LogitDifference(tokens, differing, ties, float(largest), math.sqrt(squares / count))


def fp32_tolerance(references: Sequence[Reference]) -> float:
    """How far apart the logits of two computations of the same model in fp32 may be."""
    largest = max(float(reference.logits.abs().max()) for reference in references)
    return max(FP32_TOLERANCE, FP32_RELATIVE_TOLERANCE * largest)
