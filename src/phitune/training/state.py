"""The training state: all that decides what comes next, apart from rows, base model and settings.

The order of the rows is a function of seed and epoch, dropout of seed, step and place in the step,
and nothing draws from a random generator while it trains: so no generator has a state to keep, and
a checkpoint may lie between two micro-batches. Files are the matter of `checkpoint.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from phitune.config import Settings
from phitune.data.packing import Batch
from phitune.data.steps import rows_after
from phitune.model import ops
from phitune.model.lora import Adapter
from phitune.training.checkpoint import checkpoint_name
from phitune.training.events import Evaluation
from phitune.training.sums import Span, StepSums

# -------------------------------------------------------------------------------------------------
# The optimizer, the learning rate as a function of the step, gradients, dropout.

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def build_adamw(parameters: Sequence[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over fp32 adapter matrices; the learning rate is set at each step.

    Its moments are there from the beginning, so that memory cannot run out in the midst of a step.
    It counts up the versions of what it changes, by which the engine sees that an adapter is
    another one; torch's fused kernel alone does not.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def count_up(*_: object) -> None:
        for parameter in parameters:
            torch.autograd.graph.increment_version(parameter)

    optimizer.register_step_post_hook(count_up)
    return optimizer


def learning_rate_at(
    step: int,
    *,
    total_steps: int,
    warmup_ratio: float,
    peak: float,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    It rises linearly over the first ceil(warmup_ratio * total_steps) steps and reaches its peak
    with the last of them; cosine and linear then fall towards zero, which the step after the last
    would reach.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return peak * (1 - progress)
        case "constant":
            return peak


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all gradients taken as one vector. Returns: scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scales all gradients so that their `norm` (scalar) is at most `max_norm`; 0 leaves them."""
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def dropout_of(
    batch: Batch, settings: Settings, step: int, device: torch.device
) -> ops.Dropout | None:
    """The adapter's dropout for a micro-batch of an optimizer step."""
    if settings.lora_dropout == 0:
        return None
    keys = ops.row_keys(settings.seed, step, batch.slots, batch.cu_seqlens, device)  # [T]
    return ops.Dropout(settings.lora_dropout, keys)


# -------------------------------------------------------------------------------------------------
# The state, and its tensors as files.

ADAPTER, BEST = "adapter.safetensors", "best.safetensors"
OPTIMIZER, GRADIENTS = "optimizer.safetensors", "gradients.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_TOTAL = "total"


@dataclass
class TrainingState:
    """The loop's state; its numbers are those of a checkpoint's state.json."""

    adapter: Adapter
    optimizer: torch.optim.AdamW
    steps_per_epoch: int

    # How the step is split; not in a checkpoint, since the result does not depend on it.
    micro_batch: int  # rows
    has_fitted: bool = False  # a whole step or validation, since memory ran out last

    checkpoint_seconds: float = 0.0  # spent since the last step; not in a checkpoint either

    step: int = 0  # optimizer steps done
    epochs_done: int = -1  # with their validation; -1 before that of epoch 0
    validated_step: int = 0  # the last one after which the adapter was evaluated
    seconds_since_validation: float = 0.0  # of steps
    sums: StepSums = field(default_factory=StepSums)  # of the current step's gradients
    seconds_in_step: float = 0.0
    bad_steps: int = 0  # latest steps in a row whose numbers were not finite
    recent_losses: list[float] = field(default_factory=list)

    first_validation_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int = 0
    validations_without_gain: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows_in_step(self) -> int:
        """Rows of the current step whose gradients are summed."""
        return self.sums.rows_done

    @property
    def step_in_epoch(self) -> int:
        """Steps done of the current epoch."""
        return self.step - max(self.epochs_done, 0) * self.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Epochs that the steps make: a whole number at the end of one, else with a part."""
        epochs, rest = divmod(self.step, self.steps_per_epoch)
        return self.step / self.steps_per_epoch if rest else epochs

    @property
    def name(self) -> str:
        """The name of a checkpoint of this state."""
        is_epoch_end = self.epochs_done >= 0 and not (self.step_in_epoch or self.rows_in_step)
        return checkpoint_name(
            self.step, self.rows_in_step, self.epochs_done if is_epoch_end else None
        )

    def rows_seen(self, rows: int, settings: Settings) -> int:
        """Training rows processed so far, in all epochs."""
        return rows_after(self.step, rows, settings) + self.rows_in_step

    def begin_step(self) -> None:
        """The gradients start from zero."""
        self.optimizer.zero_grad()
        self.sums, self.seconds_in_step = StepSums(), 0.0

    def sums_of(self, rows: int) -> StepSums:
        """The sums of the current step of `rows` rows; those of another split are dropped."""
        if (self.sums.rows, self.sums.micro_batch) != (rows, self.micro_batch):
            self.begin_step()
            self.sums = StepSums(rows, self.micro_batch)
        return self.sums

    def go_on_with(self, span: int) -> None:
        """The adapter's gradients are what is summed of a span so far, if anything is."""
        if of_it := self.sums.spans.get(span):
            for parameter, found in zip(self.adapter.parameters(), of_it.found, strict=False):
                parameter.grad = found

    def add_micro_batch(self, span: int, loss: Tensor) -> None:
        """The gradients of the next micro-batch of a span were added to the adapter's.

        Args:
            loss: scalar.
        """
        parameters = self.adapter.parameters()
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(found) == len(parameters)
        before = self.sums.spans.get(span)
        loss = loss.float() if before is None else before.found[-1] + loss.float()
        self.sums.spans[span] = Span(1 + (before.done if before else 0), [*found, loss])
        if self.sums.is_whole(span):
            self.sums.finish(span, found)

    def room_for_a_sum(self) -> list[Tensor]:
        """Tensors of the shapes of a step's gradients, and of its loss (scalar)."""
        parameters = self.adapter.parameters()
        loss = torch.empty((), dtype=torch.float32, device=parameters[0].device)
        return [*map(torch.empty_like, parameters), loss]

    def take_total(self) -> Tensor:
        """The step's gradients become the adapter's. Returns: scalar, the loss."""
        *gradients, loss = self.sums.total
        for parameter, gradient in zip(self.adapter.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return loss

    def count(self, evaluation: Evaluation | None, *, is_best: bool) -> None:
        """The adapter was evaluated as it is."""
        self.validated_step, self.seconds_since_validation = self.step, 0.0
        if is_best:
            self.best, self.best_step = copy_of(self.adapter), self.step
            self.best_validation_loss = evaluation.validation_loss if evaluation else None
        self.validations_without_gain = 0 if is_best else self.validations_without_gain + 1

    def restore_best(self) -> None:
        """Puts the adapter back to its best, where there was one."""
        if self.best:
            restore(self.adapter, self.best)

    def numbers(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            "rows_in_step": self.rows_in_step,
            "step_split": [self.sums.rows, self.sums.micro_batch],
            "step_sums": {
                "in_total": self.sums.spans_in_total,
                "spans": [[span, of_it.done] for span, of_it in self.sums.spans.items()],
            },
        }

    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name and tensors of each file, one file at a time; A [R, D] and B [O, R] of every pair,
        and moments and gradients in the same shapes."""
        yield ADAPTER, self.adapter.tensors()
        if self.best:
            yield BEST, self.best
        yield OPTIMIZER, self._moments()
        if self.sums.known:
            yield GRADIENTS, self._gradients()

    def load(self, numbers: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Takes over what a checkpoint holds. The adapter must be of the same shape.

        Args:
            numbers: as `numbers` gave them.
            files: contents by name, as `as_bytes` made them of `tensors`.
        """
        self.take_numbers(numbers)
        restore(self.adapter, load(files[ADAPTER]))
        device = self.adapter.parameters()[0].device
        if BEST in files:
            self.best = {name: tensor.to(device) for name, tensor in load(files[BEST]).items()}
        moments = load(files[OPTIMIZER])
        for name, parameter in self._parameters().items():
            kept = {part: moments[f"{part}.{name}"] for part in _MOMENTS if moments}
            self.optimizer.state[parameter] = {
                part: tensor.to(device) for part, tensor in kept.items()
            }
        if GRADIENTS in files:
            tensors = load(files[GRADIENTS])

            def found(name: str) -> list[Tensor]:
                return [tensors[f"{name}.{part}"].to(device) for part in self._parts_of_a_sum()]

            sums = numbers["step_sums"]
            self.sums.spans_in_total = sums["in_total"]
            self.sums.total = found(_TOTAL) if sums["in_total"] else []
            for span, done in sums["spans"]:
                self.sums.spans[span] = Span(done, found(f"span {span}"))

    def take_numbers(self, numbers: Mapping[str, Any]) -> None:
        """What is not a tensor, as `numbers` gave it."""
        for name in NUMBERS:
            setattr(self, name, numbers[name])
        self.sums = StepSums(*numbers["step_split"])

    def tensors_of_update(self) -> list[Tensor]:
        """What an update changes: A [R, D], B [O, R] and AdamW's state of each."""
        found = []
        for parameter in self.adapter.parameters():
            of_it = self.optimizer.state[parameter]
            found += [parameter, *(of_it[part] for part in _MOMENTS)]
        return found

    def _gradients(self) -> dict[str, Tensor]:  # each [R, D] or [O, R], and losses, scalar
        sums = {f"span {span}": of_it.found for span, of_it in self.sums.spans.items()}
        if self.sums.total:
            sums[_TOTAL] = self.sums.total
        return {
            f"{name}.{part}": tensor
            for name, found in sums.items()
            for part, tensor in zip(self._parts_of_a_sum(), found, strict=True)
        }

    def _parts_of_a_sum(self) -> list[str]:
        return [*self.adapter.tensors(), "loss"]

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.adapter.tensors(), self.adapter.parameters(), strict=True))

    def _moments(self) -> dict[str, Tensor]:  # step scalar, the others [R, D] or [O, R]
        return {
            f"{part}.{name}": self.optimizer.state[parameter][part]
            for name, parameter in self._parameters().items()
            if self.optimizer.state[parameter]
            for part in _MOMENTS
        }


NUMBERS = (
    "step",
    "epochs_done",
    "validated_step",
    "seconds_since_validation",
    "seconds_in_step",
    "bad_steps",
    "recent_losses",
    "first_validation_loss",
    "best_validation_loss",
    "best_step",
    "validations_without_gain",
)
# With those of the current step's sums.
SAVED_NUMBERS = (*NUMBERS, "rows_in_step", "step_split", "step_sums")


def as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of tensors of any shape, on any device."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def copy_of(adapter: Adapter) -> dict[str, Tensor]:
    """Copies of all matrices, A [R, D] and B [O, R]."""
    return {name: tensor.clone() for name, tensor in adapter.tensors().items()}


def restore(adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    """Sets an adapter to what `copy_of` returned: A [R, D] and B [O, R]."""
    with torch.no_grad():
        adapter.load_tensors(tensors)
