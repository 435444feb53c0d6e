"""Amounts of memory: as typed, in bytes, and the part of them that a run plans with.

GiB are 2**30 bytes and GB 10**9, as on the card's box and in the training guide.
"""

import re
from dataclasses import dataclass

from phitune.errors import SettingsError
from phitune.training.budget import BUDGET_SHARE
from phitune.training.memory import Device

GB = 10**9

_UNITS = {"": 10**9, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?\s*", re.IGNORECASE)
_MOST_MEMORY = 10**15


@dataclass(frozen=True)
class Memory:
    """How much there is, and who says so."""

    bytes: int
    source: str

    def budget(self, device: Device) -> int:
        """Bytes that a run plans with, the same share as in training."""
        return round(BUDGET_SHARE[device] * self.bytes)


def parse_memory(text: str) -> int:
    """ "24GB", "24G" or "24" (10**9 bytes each) and "24GiB" (2**30) as bytes.

    Raises:
        SettingsError: no amount of memory, or one that no machine has.
    """
    size = in_bytes(text)
    remedy = "write it like 24GB, 24GiB (2**30) or 24 (GB)"
    if size is None:
        raise SettingsError(f"--memory {text!r}: is not an amount of memory; {remedy}")
    if not 0 < size <= _MOST_MEMORY:
        raise SettingsError(
            f"--memory {text!r}: is {size / GB:,.0f} GB, which no machine has; {remedy}"
        )
    return size


def in_bytes(text: str) -> int | None:
    """An amount as typed, such as "5GB", "5" (GB) or "5GiB"; None where it is none."""
    match = _AMOUNT.fullmatch(text)
    if not match:
        return None
    number, unit, binary = match[1], (match[2] or "").upper(), match[3]
    return round(float(number) * (_BINARY_UNITS if binary else _UNITS)[unit])
