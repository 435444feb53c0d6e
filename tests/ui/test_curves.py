"""Curves from metrics.jsonl: few points of many lines, what is new of them, and any file at all."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.run_folders import step_line

from phitune.ui.curves import MOST_BINS, TRAIN, AllCurves, Curves


def written(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def curves_of(path: Path) -> Curves:
    curves = Curves(path)
    curves.read()
    return curves


def test_few_points_are_the_means_of_neighbours_with_their_extremes(tmp_path: Path) -> None:
    draw = random.Random(1)
    losses = [draw.random() for _ in range(10_000)]
    path = tmp_path / "metrics.jsonl"
    written(path, [step_line(n + 1, loss=loss) for n, loss in enumerate(losses)])
    train = curves_of(path).history(100)["train"]
    assert 50 < len(train["step"]) <= 100
    assert train["step"][-1] == 10_000
    first = 0
    for at, step in enumerate(train["step"]):
        group = losses[first:step]
        assert train["loss"][at] == pytest.approx(sum(group) / len(group), rel=1e-5)
        assert train["loss_min"][at] == pytest.approx(min(group), rel=1e-5)
        assert train["loss_max"][at] == pytest.approx(max(group), rel=1e-5)
        assert train["tokens"][at] == 100 * step
        first = step


def test_one_curve_alone_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [step_line(n, loss=1 / n) for n in range(1, 5000)]
    lines[7] = {"step": 8, "loss": "odd"}
    lines[9] = {"step": 10, "validation_loss": 2.0}
    written(path, lines)
    all_curves = AllCurves()
    whole, alone = (all_curves.of(path, names).history(100) for names in (TRAIN, ("loss",)))
    kept = ("step", "epoch", "tokens", "time", "loss", "loss_min", "loss_max")
    assert alone["train"] == {name: whole["train"][name] for name in kept}
    assert alone["validation"] == whole["validation"]


def test_a_short_run_is_shown_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    evaluations = [
        {"step": n, "epoch": n // 5, "validation_loss": 2.0, "time": 5.0} for n in (0, 5)
    ]
    written(path, [evaluations[0], *map(step_line, range(1, 6)), evaluations[1]])
    history = curves_of(path).history(800)
    assert history["train"]["step"] == [1, 2, 3, 4, 5]
    assert history["train"]["time"][0] == 1.79e9 + 1
    assert history["validation"] == {
        "step": [0, 5],
        "epoch": [0, 1],
        "tokens": [0, 500],
        "time": [5.0, 5.0],
        "loss": [2.0, 2.0],
    }
    assert history["incidents"] == []


def test_what_comes_later_is_told_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, [step_line(1), step_line(2)])
    curves = curves_of(path)
    mark = curves.mark
    assert curves.tail(mark)["train"]["step"] == []
    with path.open("a") as file:
        file.write(json.dumps(step_line(3)) + "\n" + json.dumps(step_line(4))[:30])
    curves.read()
    tail = curves.tail(mark)
    assert (tail["restarted"], tail["train"]["step"], tail["train"]["tokens"]) == (
        False,
        [3],
        [300],
    )
    with path.open("a") as file:  # the half line is completed
        file.write(json.dumps(step_line(4))[30:] + "\n")
        file.write(json.dumps({"step": 4, "epoch": 1, "validation_loss": 1.0}) + "\n")
    curves.read()
    tail = curves.tail(tail["offset"])
    assert (tail["train"]["step"], tail["train"]["tokens"]) == ([4], [400])
    assert tail["validation"]["loss"] == [1.0]
    assert curves.history(800)["train"]["step"] == [1, 2, 3, 4]


def test_a_run_that_goes_back_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, [step_line(n) for n in range(1, 9)])
    all_curves = AllCurves()
    mark = all_curves.of(path).mark
    # Resumed from step 4, and further than it was.
    written(path, [step_line(n, loss=9.0 if n > 4 else 1.0) for n in range(1, 12)])
    curves = all_curves.of(path)
    assert curves.tail(mark)["restarted"]
    assert curves.history(800)["train"]["loss"] == [1.0] * 4 + [9.0] * 7
    written(path, [step_line(1)])
    assert all_curves.of(path).history(800)["train"]["step"] == [1]
    path.unlink()
    assert all_curves.of(path).history(800)["train"]["step"] == []


def test_a_mark_of_long_ago_is_answered_by_asking_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, [step_line(1)])
    curves = curves_of(path)
    mark = curves.mark
    with path.open("a") as file:
        file.write("".join(json.dumps(step_line(n)) + "\n" for n in range(2, 4000)))
    curves.read()
    assert curves.tail(mark)["restarted"]
    for other in ("", "x", "-1", f"{mark}9999999", "0-0", f"{mark.partition('-')[0]}-{'9' * 30}"):
        assert curves.tail(other)["restarted"]


def test_incidents_are_told_with_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [f"a.jsonl:{n}" for n in range(5)]
    written(
        path,
        [
            step_line(1),
            {"step": 1, "epoch": 1, "loss_spike": {"loss": 9.0, "usual": 2.0}, "rows": rows},
            {"step": 2, "epoch": 1, "not_finite": {"loss": "nan"}, "rows": ["<script>\x1b"]},
            {"step": 2, "out_of_memory": "no room", "micro_batch": 2, "recompute_layers": 1},
        ],
    )
    assert curves_of(path).history(800)["incidents"] == [
        {
            "step": 1,
            "kind": "loss spike",
            "text": "loss 9, usually 2; rows a.jsonl:0, a.jsonl:1, a.jsonl:2 and 2 more",
        },
        {"step": 2, "kind": "not finite", "text": "loss nan; rows <script>\\x1b"},
        {
            "step": 2,
            "kind": "out of memory",
            "text": "no room; from here on 2 rows per micro-batch",
        },
    ]


def test_lines_that_are_none_are_counted_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = [
        b"nonsense",
        b"[1, 2]",
        b'{"loss": 1}',
        b'{"step": -1, "loss": 1}',
        b'{"step": true, "loss": 1}',
        b'{"step": 3, "loss": NaN}',
        b'{"step": 3, "note": "' + b"x" * 3_000_000 + b'"}',
        b"[" * 100_000,
        b"\xff\xfe",
    ]
    good = [json.dumps(step_line(n)).encode() for n in (1, 2)]
    huge = b"9" * 400
    odd = b'{"step": 3, "loss": "many", "tokens": null, "epoch": [], "grad_norm": %b}' % huge
    path.write_bytes(b"\n".join([good[0], *bad, b"", good[1], odd]) + b"\n" + b'{"step": 4')
    curves = curves_of(path)
    history = curves.history(800)
    assert history["train"]["step"][:2] == [1, 2]
    assert history["train"]["loss"][:2] == [2.99, 2.98]
    (incident,) = history["incidents"]
    assert incident["text"].startswith(f"{len(bad)} lines")
    assert (history["train"]["step"][2:], history["train"]["grad_norm"][2:]) == ([3], [None])
    json.dumps(curves.tail(curves.mark), allow_nan=False)
    json.dumps(history, allow_nan=False)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = Curves(path)
    for part in range(8):  # as it grows, so that the first bins are narrow
        with path.open("a") as file:
            file.write(
                "".join(json.dumps(step_line(part * 1000 + n)) + "\n" for n in range(1, 1001))
            )
        curves.read()
    assert len(curves._bins) <= MOST_BINS
    assert sum(each.count for each in curves._bins) == 8000
    assert curves.history(50)["train"]["tokens"][-1] == 800_000
