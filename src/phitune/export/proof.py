"""The proof of an export: what it answers, beside what the adapter in memory answers.

The adapter in memory answers fixed prompts greedily. The export is then given each prompt and
answer, and says at every token of the answer what it would have said: as long as the most probable
token is the same everywhere, so is the greedy answer, and behind a first difference the comparison
goes on.

Not here: how an export is loaded; see the modules of the formats.

Shapes: n tokens of an answer, V vocabulary.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phitune.data.dataset import Turn
from phitune.inference.loaded import LoadedModel
from phitune.model.decoder import Decoder
from phitune.training.rundir import SAMPLES
from phitune.untrusted import write_object

# -------------------------------------------------------------------------------------------------
# The prompts that every export answers: short questions of many kinds, the same for all models.

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


# -------------------------------------------------------------------------------------------------

PROOF_FILE = "export_proof.json"
MAX_NEW_TOKENS = 24
RUN_PROMPTS = 8
_PACKED = 8  # prompts that are computed together
# Two tokens are a tie where what separates them is less than this.
TIE = 1e-3
# Largest difference of a logit in fp32 where nothing is rounded on the way: this much, or this part
# of the largest logit where that is more (the sums of a deep model are rounded in other orders).
FP32_TOLERANCE, FP32_RELATIVE_TOLERANCE = 1e-4, 1e-5
# What rounding the merged weights may do to the logits, as a multiple of what rounding them at
# random does. Typically it is 0.7 times as much (half a unit at most against a whole one); the
# largest of many differences is a matter of chance.
TYPICAL_ROUNDING, LARGEST_ROUNDING = 1.5, 4.0


@dataclass(frozen=True)
class Proof:
    """What was compared, and how far apart it was."""

    format: str
    compared: str  # what with what, in words
    prompts: int
    tokens: int  # greedy tokens compared
    tokens_differing: int  # not counting ties
    ties_excused: int  # differing tokens that less than `tie_below` separates
    tie_below: float
    largest_logit_difference: float | None  # None where the other side tells no logits
    tolerance: float | None
    measured: Mapping[str, Any] = field(default_factory=dict)  # whatever else a format measures
    typical_logit_difference: float | None = None  # the root of the mean square
    typical_tolerance: float | None = None
    # Of the adapter's answers, as a share. With a tolerance for it single tokens are not judged: a
    # quantised model is another model, and may say other words.
    perplexity_rise: float | None = None
    perplexity_tolerance: float | None = None

    @property
    def passed(self) -> bool:
        pairs = (
            (self.largest_logit_difference, self.tolerance),
            (self.typical_logit_difference, self.typical_tolerance),
            (self.perplexity_rise, self.perplexity_tolerance),
        )
        same = not self.tokens_differing or self.perplexity_tolerance is not None
        return same and all(
            difference <= tolerance  # Not so for NaN.
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
            said += (
                f", perplexity of the answers {self.perplexity_rise:+.2%}"
                f" (tolerance {self.perplexity_tolerance:+.0%})"
            )
        return said


def write_proof(folder: Path, proof: Proof, about: Mapping[str, Any]) -> None:
    """export_proof.json: the proof, what it is about, and the files of the export."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    figures = {name: value for name, value in vars(proof).items() if name != "measured"}
    content = {**about, **figures, **proof.measured, "passed": proof.passed, "files": files}
    write_object(folder / PROOF_FILE, content)


@dataclass(frozen=True)
class Answered:
    """A prompt and its greedy answer, and the logits that each of its tokens was chosen from."""

    text: str
    prompt_ids: list[int]
    answer_ids: list[int]  # [n], with the stop token if it came to one
    logits: Tensor  # [n, V] in fp32, on the CPU


def proof_prompts(run: Path | None) -> list[str]:
    """The shipped prompts, and some of those that a run's samples answered."""
    asked = _asked_by(run / SAMPLES) if run and (run / SAMPLES).is_file() else []
    others = [prompt for prompt in dict.fromkeys(asked) if prompt not in PROMPTS]
    return [*PROMPTS, *others[:RUN_PROMPTS]]


def _asked_by(samples: Path) -> Iterator[str]:
    with samples.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):  # The half line of a killed run.
                continue
            if isinstance(prompt, str):
                yield prompt


def greedy_answers(
    loaded: LoadedModel, prompts: Sequence[str], choice: int | None = 0
) -> list[Answered]:
    """What a model in memory answers, each prompt as a question in its format."""
    ids = [loaded.coder(choice).encode((Turn("user", prompt),)) for prompt in prompts]
    answers = loaded.answers(ids, [choice] * len(ids), max_new_tokens=MAX_NEW_TOKENS)
    said = [answer.ids for answer in answers]
    loaded.on_decoder.choose([choice])
    return [
        Answered(*one)
        for one in zip(prompts, ids, said, forced_logits(loaded.decoder, ids, said), strict=True)
    ]


@torch.inference_mode()
def forced_logits(
    decoder: Decoder, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """What a decoder would choose each token of each answer from.

    Args:
        prompts, answers: ids; computed with what is chosen on the decoder.

    Returns: for each answer [n, V], in fp32, on the CPU.
    """
    found = []
    # Many at once: for a few tokens, reading the weights takes longer than the products.
    for start in range(0, len(prompts), _PACKED):
        pairs = list(zip(prompts, answers, strict=True))[start : start + _PACKED]
        rows = [[*prompt, *answer[:-1]] for prompt, answer in pairs]
        ends = [0, *itertools.accumulate(map(len, rows))]
        input_ids = torch.tensor([token for row in rows for token in row], device=decoder.device)
        positions = torch.cat([torch.arange(len(row)) for row in rows]).to(decoder.device)
        hidden = decoder(input_ids, positions, ends)
        for (prompt, _), first, stop in zip(pairs, ends, ends[1:], strict=False):
            found.append(decoder.logits(hidden[first + len(prompt) - 1 : stop]).float().cpu())
    return found


def logits_on(decoder: Decoder, answers: Sequence[Answered]) -> list[Tensor]:
    """`forced_logits` of another model on answers that were given before."""
    prompts = [answer.prompt_ids for answer in answers]
    return forced_logits(decoder, prompts, [answer.answer_ids for answer in answers])


@dataclass(frozen=True)
class Comparison:
    """Two models on the same answers."""

    tokens: int
    differing: int
    ties: int
    largest: float
    typical: float  # the root of the mean square


def compare(answers: Sequence[Answered], logits: Sequence[Tensor], tie_below: float) -> Comparison:
    """What the adapter in memory answered, against another's logits on the same answers.

    Args:
        logits: for each answer [n, V].
        tie_below: a differing token is a tie where the adapter's logits of the two are closer.
    """
    tokens = differing = ties = 0
    largest, squares, count = torch.zeros(()), 0.0, 0
    for answer, theirs in zip(answers, logits, strict=True):
        ours = answer.logits
        # Not max(): it would forget NaN, which then has to be the result.
        largest = torch.maximum(largest, (ours - theirs).abs().max())
        squares += float((ours - theirs).double().pow(2).sum())
        count += ours.numel()
        chosen, other = ours.argmax(-1), theirs.argmax(-1)
        gap = ours.gather(-1, chosen.unsqueeze(-1)) - ours.gather(-1, other.unsqueeze(-1))
        differs = chosen != other
        close = differs & (gap.squeeze(-1) < tie_below)
        tokens += len(chosen)
        ties += int(close.sum())
        differing += int(differs.sum() - close.sum())
    return Comparison(tokens, differing, ties, float(largest), math.sqrt(squares / count))


def fp32_tolerance(answers: Sequence[Answered]) -> float:
    """How far apart two computations of the same model in fp32 may be."""
    largest = max(float(answer.logits.abs().max()) for answer in answers)
    return max(FP32_TOLERANCE, FP32_RELATIVE_TOLERANCE * largest)
