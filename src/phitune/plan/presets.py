"""The training guide's configurations, and the memory that the guide gives for each.

`phitune plan` shows what each takes with the model at hand, and `--preset` plans with one of them;
tools/build_docs.py writes them as YAML files. What they take is memory.py's sum, never the guide's.
"""

from dataclasses import dataclass
from typing import Any

from phitune.config import unknown_name
from phitune.errors import SettingsError
from phitune.plan.machine import APPLE_SHARE, GB, Memory
from phitune.plan.memory import GIB, Device


@dataclass(frozen=True)
class Preset:
    """One configuration of the training guide."""

    batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    guide_gb: int
    device: Device

    @property
    def memory(self) -> Memory:
        """Of the machine that the guide names it for."""
        if self.device == "cuda":
            return Memory(24 * GB, "24 GB of an A10G")
        # 12.9 GB of 18 GiB is what macOS recommends its GPU to use.
        return Memory(round(18 * GIB * APPLE_SHARE), "12.9 GB recommended by macOS on an 18 GB Mac")

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_length": self.max_length,
            "device": self.device,
        }


PRESETS = {
    "a10g-high": Preset(8, 4, 2048, 20, "cuda"),
    "a10g-balanced": Preset(4, 8, 1024, 16, "cuda"),
    "a10g-low": Preset(2, 16, 768, 12, "cuda"),
    "m3-high": Preset(3, 8, 1024, 16, "mps"),
    "m3-balanced": Preset(2, 16, 1024, 14, "mps"),
    "m3-low": Preset(2, 16, 768, 12, "mps"),
    "m3-safe": Preset(1, 32, 768, 10, "mps"),
}


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset; flags that were given win over them.

    Raises:
        SettingsError: there is no such preset.
    """
    if name not in PRESETS:
        problem = unknown_name(name, PRESETS, kind="preset", prefix="--preset ")
        raise SettingsError(f"{problem}\nThere are {', '.join(PRESETS)}.")
    return PRESETS[name].settings
