"""The processes of a run, as the loop sees them: which spans are this one's, and where all meet.

`ALONE` is the only process of a run; `group.Group` is one of several. Nothing here needs
torch.distributed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from phitune.training.state import TrainingState


class Processes:
    """What the loop asks; by itself the only process of a run, which has nobody to meet."""

    rank, size = 0, 1
    device = torch.device("cpu")  # of the tensors that travel
    on_this_machine = 1
    on_this_device = 1  # how many of them share the memory of this one's device

    @property
    def stopping(self) -> str | None:
        """The signal by which any of them was asked to stop; looked at between micro-batches.

        Raises:
            LostProcessError: one of them is gone.
        """
        return None

    def ask_to_stop(self, by: str) -> None:
        """Has all of them stop after their micro-batch; a process alone just leaves the loop.

        Args:
            by: the signal's name.
        """

    def share(self, numbers: Sequence[int]) -> Sequence[int]:
        """This process's of the spans of a step: neighbours, about as many as others have."""
        first, last = (-(-len(numbers) * each // self.size) for each in (self.rank, self.rank + 1))
        return numbers[first:last]

    def meet(self, said: Any) -> list[Any]:
        """Waits for all others. Returns: what each of them said, by rank, in JSON's types.

        Raises:
            LostProcessError: one of them is gone.
        """
        return [said]

    def tell(self, name: str, said: Any) -> None:
        """Leaves something for the others."""

    def collect(self, state: TrainingState) -> None:
        """Brings all sums of the current step to process 0."""

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Makes tensors of any shape what they are in process 0."""

    def start_others(self) -> None:
        """Starts the processes 1, 2, ... of this machine, where torchrun does not."""

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """While this process trains; the others are told how it ends."""
        yield


ALONE = Processes()
