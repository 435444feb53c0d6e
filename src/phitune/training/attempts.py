"""Work that is done again, in a finer cut, where memory runs out in the middle of it."""

from collections.abc import Callable
from typing import TypeVar

from phitune.errors import OutOfMemoryError
from phitune.model.allocation import give_back_memory, is_out_of_memory, with_products
from phitune.model.engine import Engine
from phitune.training.cut import Cut, Narrowing
from phitune.training.state import TrainingState

T = TypeVar("T")


class Attempts:
    """The cut at hand, and the rule by which it becomes finer.

    What failed is dropped as a whole: the gradients of the step at hand start from nothing, so
    that none of its rows counts twice or by half.
    """

    def __init__(
        self,
        engine: Engine,
        state: TrainingState,
        micro_batch: int,
        rows_per_step: int,
        tell: Callable[[Narrowing], None],
    ) -> None:
        """
        Args:
            micro_batch: rows at once to begin with; the layers to recompute are the engine's.
            tell: called for each finer cut, before it is tried.
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
                done = with_products(work)
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
        if self._has_fitted:
            # In this cut there was room before: what is free lay in pieces, and that is mended.
            self._has_fitted = False
            return
        narrower = self.cut.narrower(self._rows_per_step, self._engine.num_layers)
        if narrower is None:
            raise OutOfMemoryError(f"{why} (one row at a time, every layer recomputed)")
        self._tell(Narrowing(self._state.step, self.cut, narrower, why, given_up))
        self.cut = narrower
        self._engine.recompute_layers = narrower.recompute_layers


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
