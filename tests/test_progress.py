"""What a person sees: live where the cursor moves, one line an event everywhere else."""

import io

import pytest
from rich.console import Console

from phitune.config import resolve
from phitune.inference.loaded import Answer
from phitune.progress import (
    LiveView,
    PlainView,
    Position,
    answers_table,
    data_progress,
    guessing_lines,
    open_view,
    settings_lines,
)
from phitune.training.events import (
    Evaluated,
    Evaluation,
    MicroBatchDone,
    StepDone,
    StepMetrics,
    Validating,
)

METRICS = StepMetrics(
    step=3,
    epoch=1,
    loss=1.25,
    learning_rate=2e-4,
    grad_norm=0.5,
    tokens=800,
    tokens_per_second=1234.5,
    memory_gib=1.5,
)
PROMPT = "two\nlines [bold]"
ANSWER = Answer("an [red]answer", (1, 2, 3, 4), stopped=False)


def console(*, terminal: bool, term: str = "xterm", width: int = 80) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, _environ={"TERM": term}
    )


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_the_view_fits_the_terminal() -> None:
    assert isinstance(open_view(console(terminal=True)), LiveView)
    assert isinstance(open_view(console(terminal=True, term="dumb")), PlainView)
    assert isinstance(open_view(console(terminal=False)), PlainView)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_shows_its_numbers_and_its_samples(terminal: bool) -> None:
    shown = console(terminal=terminal, width=40)
    view = open_view(shown)
    view.start(Position(steps=10, rows=640), Position(steps=0, rows=0))
    for event in (
        Validating(4, 8),
        Evaluated(0, Evaluation(0, 0, 2.5), is_best=False),
        MicroBatchDone(4),
        StepDone(METRICS),
        Evaluated(1, Evaluation(3, 1, 1.75), is_best=True),
    ):
        view.show(event)
    view.show_samples([PROMPT], [ANSWER])
    view.close()
    text = text_of(shown)
    assert "2.5000" in text
    assert "validation loss 1.7500  best so" in text
    assert "[bold]" in text  # The user's brackets are not markup.
    assert "1.2500" in text
    if not terminal:
        step = next(line for line in text.splitlines() if line.startswith("step 3/10"))
        assert "1,234 tokens/s" in step
        assert "1.50 GiB" in step
        assert step.endswith(" left")


def test_settings_keep_their_lines_whole_and_name_their_origins() -> None:
    shown = console(terminal=False, width=40)
    resolved = resolve({"sample_prompts": ["a" * 60, "b"], "epochs": "3"})
    shown.print(settings_lines(resolved, verbose=True), soft_wrap=True)
    lines = [line.split() for line in text_of(shown).splitlines()]
    assert ["epochs", "3", "(flag)"] in lines
    assert ["sample_prompts", "a" * 60, "|", "b", "(flag)"] in lines
    assert ["dataset_path", "-", "(default)"] in lines


def test_settings_at_their_defaults_are_left_out_unless_they_are_asked_for() -> None:
    shown = console(terminal=False)
    resolved = resolve({"epochs": "3", "batch_size": "4"}).choose(precision="fp32", seed=42)
    shown.print(settings_lines(resolved, verbose=False), soft_wrap=True)
    assert text_of(shown).splitlines() == [
        "Settings that are not the defaults (--verbose: all)",
        "  epochs  3  (flag)",
        "  chosen here: precision fp32",
    ]


def test_a_model_that_knows_less_than_chance_is_named() -> None:
    assert guessing_lines(7.33, 1536, "tiny-phi-2") == []
    (line,) = guessing_lines(11.2, 1536, "tiny-phi-2")
    assert "11.20, worse than guessing (7.34, the logarithm of 1,536 tokens)" in line
    assert "the demo's" in line
    (line,) = guessing_lines(11.2, 51200, "microsoft/phi-2")
    assert "(10.84, the" in line
    assert "--prompt_format" in line


def test_answers_stand_side_by_side_and_say_when_they_did_not_stop() -> None:
    shown = console(terminal=False)
    shown.print(answers_table([PROMPT], [ANSWER], [Answer("tuned", (1,), stopped=True)]))
    text = text_of(shown)
    assert "an [red]answer" in text
    assert text.count("did not") == 1


def test_tokenising_shows_its_progress_on_a_terminal_only() -> None:
    with data_progress(console(terminal=False)) as progress:
        assert progress is None
    shown = console(terminal=True)
    with data_progress(shown) as progress:
        assert progress
        progress(12_000, 3, 4)
    text = text_of(shown)
    assert "12,000 rows" in text
    assert "75%" in text
