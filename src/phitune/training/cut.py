"""How an optimizer step is cut: the same rows and the same result, in more or less memory.

No torch here: plans speak of it too.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Cut:
    """What of a step is held at once. None of it changes the result, apart from rounding."""

    micro_batch: int  # rows that go through the model together
    recompute_layers: int  # layers, from the lowest, that keep their input only

    def narrower(self, rows_per_step: int, num_layers: int) -> "Cut | None":
        """The next cut that takes less; None where there is none.

        The micro-batch goes first, in two halves (or the next smaller part that divides the step's
        rows); with one row left, half of the layers that still keep what they computed.
        """
        if self.micro_batch > 1:
            return Cut(smaller_part(self.micro_batch, rows_per_step), self.recompute_layers)
        stored = num_layers - self.recompute_layers
        return Cut(1, self.recompute_layers + (stored + 1) // 2) if stored > 0 else None

    def settings(self, rows_per_step: int) -> dict[str, Any]:
        """As the settings that ask for it."""
        settings = {
            "batch_size": self.micro_batch,
            "gradient_accumulation_steps": rows_per_step // self.micro_batch,
            "recompute_layers": self.recompute_layers,
        }
        if self.recompute_layers:
            settings["gradient_checkpointing"] = True  # Without it no layer may be recomputed.
        return settings


def smaller_part(micro_batch: int, rows_per_step: int) -> int:
    """Half of a micro-batch of two rows or more, or the next smaller part that divides the step."""
    return next(size for size in range(micro_batch // 2, 0, -1) if rows_per_step % size == 0)


@dataclass(frozen=True)
class Shortage:
    """Memory ran out, and the step or the validation at hand begins again."""

    after_step: int
    then: Cut
    now: Cut  # the same, where there was room in it before: what is free had come to lie in pieces
    why: str  # what the allocator said
    rows_given_up: int = 0  # of the step at hand

    def __str__(self) -> str:
        """What changes."""
        if self.now == self.then:
            return "nothing changes, as it fitted before"
        then, now = asdict(self.then), asdict(self.now)
        names = {"micro_batch": "rows at once", "recompute_layers": "layers recomputed"}
        changes = [
            f"{names[name]} {then[name]} -> {now[name]}" for name in then if then[name] != now[name]
        ]
        return ", ".join(changes)
