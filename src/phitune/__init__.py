"""phitune: fine-tune Phi-2, Phi-3.5 and their siblings with LoRA on the machine you own."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phitune.inference.chat import load as load
    from phitune.inference.generate import Sampling as Sampling
    from phitune.trainer import LoRATrainer as LoRATrainer
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
__all__ = ["LoRATrainer", "Phi2LoRATrainer", "Sampling", "__version__", "load"]
_MODULES = {
    "LoRATrainer": "phitune.trainer",
    "Phi2LoRATrainer": "phitune.trainer",
    "Sampling": "phitune.inference.generate",
    "load": "phitune.inference.chat",
}


def __getattr__(name: str) -> Any:
    # Deferred, so that `phitune --help` does not pay for what training and answering need.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
