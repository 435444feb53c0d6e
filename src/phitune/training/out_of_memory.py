"""How an optimizer step is cut: the same rows and the same result, in more or less memory.

No torch here: plans speak of it too.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from phitune.errors import OutOfMemoryError
from phitune.model.device import give_back_memory, in_usable_thread, is_out_of_memory
from phitune.model.engine import Engine
from phitune.plan.plan import smaller_part
from phitune.training.state import TrainingState


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


# -------------------------------------------------------------------------------------------------
# Work that is done again, in a finer cut, where memory runs out in the middle of it.

T = TypeVar("T")


class Attempts:
    """The cut at hand, and the rule by which it becomes finer.

    Where a cut had room before, it is tried once more: what is free had come to lie in pieces, and
    that is mended by giving it back. What failed is dropped as a whole: the gradients of the step
    at hand start from nothing, so that none of its rows counts twice or by half.
    """

    def __init__(
        self,
        engine: Engine,
        state: TrainingState,
        micro_batch: int,
        rows_per_step: int,
        tell: Callable[[Shortage], None],
    ) -> None:
        """
        Args:
            micro_batch: rows at once to begin with; the layers to recompute are the engine's.
            tell: called each time that memory ran out, before it is tried again.
        """
        self.cut = Cut(micro_batch, engine.recompute_layers)
        self._engine = engine
        self._state = state
        self._rows_per_step = rows_per_step
        self._tell = tell
        self._has_fitted = False  # since memory ran out last

    def __call__(self, work: Callable[[], T]) -> T:
        """Does the work, as often as it takes.

        Args:
            work: to be done from its beginning each time; reads the cut anew.

        Raises:
            OutOfMemoryError: it does not fit in the finest cut either.
        """
        while True:
            try:
                done = in_usable_thread(work)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                why = first_line(error)
            else:
                self._has_fitted = True
                return done
            # Only here, behind the clause, does nothing hold the tensors of the attempt any more.
            given_up = self._state.rows_in_step
            self._state.begin_step()
            give_back_memory(self._engine.device)
            self._narrow(why, given_up)

    def _narrow(self, why: str, given_up: int) -> None:
        following: Cut | None = self.cut
        if not self._has_fitted:
            following = self.cut.narrower(self._rows_per_step, self._engine.num_layers)
        self._has_fitted = False
        if following is None:
            raise OutOfMemoryError(f"{why} (one row at a time, every layer recomputed)")
        self._tell(Shortage(self._state.step, self.cut, following, why, given_up))
        self.cut = following
        self._engine.recompute_layers = following.recompute_layers


def first_line(error: BaseException) -> str:
    """What the allocator said, in one line; a MemoryError often says nothing."""
    line = (str(error).splitlines() or ["no memory is left"])[0]
    return line[max(line.find("DefaultCPUAllocator"), 0) :]


def why_not_written(error: Exception) -> str:
    """What kept something from being written: the disk, or memory.

    Raises:
        Exception: this very error, where it was neither.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if is_out_of_memory(error):
        return "out of memory"
    raise error
