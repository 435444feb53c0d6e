"""phitune: fine-tune Phi-2, Phi-3.5 and their siblings with LoRA on the machine you own."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phitune.trainer import Phi2LoRATrainer as Phi2LoRATrainer

# The hub's library reads it when it is imported: nothing is told to anyone who was not asked.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if sys.platform == "linux":
    # Read when torch is. Threads that wait in a loop wait for ever for threads that other programs
    # keep from running; on two cores beside four other processes, training took 20 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
    # Read at the first allocation on a GPU. Without it, the holes between tensors of changing sizes
    # hold 3 to 15 % more of the card's memory than the plan (docs/lab-notes.md).
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

__version__ = "0.1.0"
__all__ = ["Phi2LoRATrainer", "__version__"]


def __getattr__(name: str) -> Any:
    # Deferred, so that `phitune --help` does not pay for what training needs.
    if name == "Phi2LoRATrainer":
        from phitune.trainer import Phi2LoRATrainer

        return Phi2LoRATrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
