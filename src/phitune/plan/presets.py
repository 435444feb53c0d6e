"""The training guide's configurations, and the memory that the guide gives for each.

`phitune plan` shows what each takes with the model at hand, and `--preset` plans with one of them;
tools/build_docs.py writes them as YAML files. What they take is memory.py's sum, never the guide's.
"""

from dataclasses import dataclass
from typing import Any

from phitune.errors import SettingsError
from phitune.neighbours import unknown_name
from phitune.plan.machine import APPLE_SHARE, GB, Memory
from phitune.plan.memory import GIB, Device


@dataclass(frozen=True)
class Preset:
    """One configuration of the training guide."""

    batch_size: int  # rows of a micro-batch
    gradient_accumulation_steps: int  # micro-batches of a step
    max_length: int  # tokens of a row at most
    guide_gb: int  # the peak that the guide names, in GB
    device: Device  # the kind of device that it is for

    @property
    def machine(self) -> Memory:
        """Of the machine that the guide names it for."""
        if self.device == "cuda":
            return Memory(24 * GB, "24 GB of an A10G")
        # 12.9 GB of 18 GiB is what macOS recommends its GPU to use.
        return Memory(round(18 * GIB * APPLE_SHARE), "12.9 GB recommended by macOS on an 18 GB Mac")

    @property
    def memory(self) -> Memory:
        """What it is planned with: the machine's; on a Mac, whose memory is not the run's alone, at
        most what the guide gives it."""
        if self.device == "cuda" or self.machine.bytes <= self.guide_gb * GB:
            return self.machine
        return Memory(self.guide_gb * GB, f"the guide's {self.guide_gb} GB of an 18 GB Mac")

    def is_for(self, device: Device) -> bool:
        """Whether its machine has such a device; on a Mac torch's is one, too."""
        return device == self.device or (device == "mps" and self.device == "mlx")

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
    "m3-high": Preset(3, 8, 1024, 16, "mlx"),
    "m3-balanced": Preset(2, 16, 1024, 14, "mlx"),
    "m3-low": Preset(2, 16, 768, 12, "mlx"),
    "m3-safe": Preset(1, 32, 768, 10, "mlx"),
}


# A given memory is that of a preset's machine if it differs by less: 24 GiB are 24 GB of an A10G.
_ABOUT = 0.08


def preset_named(name: str, device: str, memory: int | None) -> str:
    """The preset that is meant: by its whole name, or by "balanced" and the device or its memory.

    Args:
        device: that of the settings, "auto" where it is open.
        memory: bytes that were given; None where they were not.

    Raises:
        SettingsError: it cannot be told which.
    """
    found = {full: preset for full, preset in PRESETS.items() if full.endswith(f"-{name}")}
    if name in PRESETS or not found:
        return name
    kind = device.partition(":")[0]
    if kind == "auto" and memory is not None:
        meant = [
            full
            for full, preset in found.items()
            if abs(memory / preset.machine.bytes - 1) < _ABOUT
        ]
    elif kind == "auto":
        meant = list(found)
    else:
        kinds: dict[str, Device] = {"cuda": "cuda", "mlx": "mlx", "mps": "mps"}
        meant = [full for full, preset in found.items() if preset.is_for(kinds.get(kind, "cpu"))]
    if len(meant) != 1:
        raise SettingsError(
            f"--preset {name}: there {'are' if len(found) > 1 else 'is'} {' and '.join(found)};"
            " name the one that you mean, or its device with --device cuda or --device mlx"
        )
    return meant[0]


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset; flags that were given win over them.

    Raises:
        SettingsError: there is no such preset.
    """
    if name not in PRESETS:
        problem = unknown_name(name, PRESETS, kind="preset", prefix="--preset ")
        raise SettingsError(f"{problem}\nThere are {', '.join(PRESETS)}.")
    return PRESETS[name].settings
