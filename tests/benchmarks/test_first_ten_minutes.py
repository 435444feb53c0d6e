"""A newcomer comes from a file of questions to an exported model that answers them."""

from pathlib import Path

import pytest
from first_ten_minutes import play


@pytest.mark.campaign
@pytest.mark.longest
def test_each_command_is_there_to_copy_and_the_last_answer_is_right(tmp_path: Path) -> None:
    steps = play(tmp_path).steps
    before_the_first_step = steps[2].output.partition("\nstep 1/")[0]
    assert before_the_first_step.count("\n") <= 25, before_the_first_step
