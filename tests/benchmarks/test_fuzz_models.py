"""Hundreds of damaged folders as a campaign; `make fuzz` tries twenty thousand."""

import os
import sys

import pytest
from fuzz_models import campaign

CASES = int(os.environ.get("PHITUNE_FUZZ_MODELS", "300"))


@pytest.mark.campaign
@pytest.mark.longest
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory and counts it as Linux does")
def test_any_damaged_folder_loads_or_is_refused_in_one_error() -> None:
    found = campaign(CASES, seed=0)
    assert found.failures == []
    assert sum(found.outcomes.values()) == CASES
    # Both happen, to models and to adapters: the damage is neither nothing nor everything.
    for kind in ("phi model", "phi3 sharded", "phi adapter"):
        assert found.outcomes[f"{kind}/loaded"], found.outcomes
        assert found.outcomes[f"{kind}/refused"], found.outcomes
