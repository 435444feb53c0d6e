"""What the loop reported, and an adapter as bytes."""

from dataclasses import dataclass, field

from phitune.model.lora import Adapter
from phitune.training.loop import BadNumbers, Evaluation, StepMetrics
from phitune.training.loop import Events as LoopEvents
from phitune.training.out_of_memory import Shortage


@dataclass
class Events(LoopEvents):
    steps: list[StepMetrics] = field(default_factory=list)
    evaluations: list[tuple[Evaluation | None, bool]] = field(default_factory=list)
    refused: list[BadNumbers] = field(default_factory=list)
    shortages: list[Shortage] = field(default_factory=list)
    sequences: int = 0
    evaluated: tuple[int, int] = (0, 0)

    def micro_batch_done(self, sequences: int) -> None:
        self.sequences += sequences

    def step_done(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def numbers_refused(self, bad: BadNumbers) -> None:
        self.refused.append(bad)

    def memory_ran_out(self, shortage: Shortage) -> None:
        self.shortages.append(shortage)

    def evaluating(self, done: int, sequences: int) -> None:
        self.evaluated = done, sequences

    def epoch_done(self, epoch: int, evaluation: Evaluation | None, *, is_best: bool) -> None:
        self.evaluations.append((evaluation, is_best))


def bytes_of(adapter: Adapter) -> bytes:
    return b"".join(t.numpy().tobytes() for t in adapter.tensors().values())
