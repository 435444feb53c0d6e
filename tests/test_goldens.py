"""Small runs and the JSON of commands are what they were: tests/goldens, made by
benchmarks/goldens.py from the command line alone.

Where a change of results is meant, `python benchmarks/goldens.py --renew` makes the files anew; its
commit says why they changed.
"""

import json
from typing import Any

import goldens
import torch

# Another processor or torch rounds sums differently. With torch's libraries limited to AVX2 and to
# SSE4, losses and gradient norms of these runs moved by at most 4e-6 of themselves; with another
# seed of the dropout, every loss from the second step on moves by 5e-4 or more.
RELATIVE = 1e-4
COMPARED = ("loss", "validation_loss", "grad_norm", "learning_rate", "step", "epoch", "tokens")


def test_small_runs_of_both_families_and_engines_are_bit_equal_to_their_golden_files() -> None:
    before = json.loads((goldens.COMMITTED / "runs.json").read_text("utf-8"))
    made = goldens.make_runs()
    assert torch.get_num_threads() == made["signature"]["threads"] == 1
    if made["signature"] == before["signature"]:
        found = goldens.differences(before, made)
    else:
        old, new = (without_last_bits(each["runs"]) for each in (before, made))
        found = goldens.differences(old, new, RELATIVE)
    assert not found, "\n".join(found)


def without_last_bits(runs: dict[str, Any]) -> dict[str, Any]:
    """What another processor computes too: numbers but for their last bits, names of files."""
    return {
        name: {
            "exits": run["exits"],
            "metrics": [{k: line[k] for k in COMPARED if k in line} for line in run["metrics"]],
            "prompts": [(line["epoch"], line["prompt"]) for line in run["samples"]],
            "files": {
                file: "" if file.endswith(".safetensors") else digest
                for file, digest in run["files"].items()
            },
        }
        for name, run in runs.items()
    }


def test_json_of_plan_check_and_layers_is_that_of_its_golden_file() -> None:
    before = json.loads((goldens.COMMITTED / "commands.json").read_text("utf-8"))
    # Sums over rows and layers may be taken in another order.
    found = goldens.differences(before, goldens.make_commands(), 1e-6)
    assert not found, "\n".join(found)


def test_differences_are_named_with_their_place() -> None:
    old = {"a": [1.0, 2.0], "said": "one thing", "gone": 1, "answer": "It is 1.", "lines": ["x"]}
    new = {"a": [1.0, 2.5], "said": "another", "now": 1, "answer": "It is 2.", "lines": ["x", "y"]}
    found = goldens.differences(old, new)
    assert "a > 1: 2.0, now 2.5" in found
    assert "gone: gone, was 1" in found
    assert 'lines: 1 entries, now 2\n    +"y"' in found
    assert len(found) == 6
    old, new = goldens.facts(goldens.with_new_names(old, {"gone": "now"})), goldens.facts(new)
    # What a model said is no wording.
    places = [line.partition(":")[0] for line in goldens.differences(old, new)]
    assert places == ["a > 1", "answer", "lines"]
    assert goldens.differences(1.0, 1.0 + 1e-7, 1e-6) == []
    assert goldens.differences(1, 1.0) == [": 1, now 1.0"]
