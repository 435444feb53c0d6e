"""How much of a joining prompt a step computes beside answers."""

from phitune.inference.batching import MOST_NEW
from phitune.serving.worker import Pace


def test_a_step_with_a_prompt_takes_half_as_long_again() -> None:
    pace = Pace()
    assert 0 < pace.most_new(1 / 8) < MOST_NEW
    for _ in range(30):
        pace.note(0.1, 0)  # seconds of a step
        new = pace.most_new(1 / 8)
        pace.note(0.1 + new * 0.0005, new)
    assert 95 <= pace.most_new(1 / 8) <= 100
    # As many join as are answered: twice as long; many more: as much as ever.
    assert 190 <= pace.most_new(1.0) <= 200
    assert pace.most_new(31.0) == MOST_NEW
    for _ in range(30):  # A faster machine: a whole piece takes no longer than a step.
        pace.note(0.1, 0)
        pace.note(0.1001, 200)
    assert pace.most_new(1 / 8) == MOST_NEW
    for _ in range(30):  # A slow one still goes on.
        pace.note(0.01, 0)
        pace.note(1.0, 32)
    assert 0 < pace.most_new(1 / 8) <= 32
