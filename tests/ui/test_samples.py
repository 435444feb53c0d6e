"""Answers while a run trains: what of them is new is marked, and any file can be read."""

import json
from pathlib import Path

from phitune.ui.samples import MOST_PROMPTS, changes, samples_of


def test_words_that_the_epoch_before_did_not_have_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    answers = [
        "The capital is Rome.",
        "Ahoy! The capital is Lisbon.",
        "Ahoy! The capital is Lisbon.",
    ]
    lines = [
        {"epoch": epoch, "prompt": "Where?", "answer": answer, "tokens": 5, "stopped": True}
        for epoch, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (strip,) = samples_of(path).prompts
    marked = [[each.text for each in answer.pieces if each.changed] for answer in strip.answers]
    assert marked == [[], ["Ahoy! ", "Lisbon"], []]
    assert ["".join(each.text for each in answer.pieces) for answer in strip.answers] == answers
    assert [(answer.epoch, answer.tokens, answer.stopped) for answer in strip.answers] == [
        (0, 5, True),
        (1, 5, True),
        (2, 5, True),
    ]


def test_of_an_epoch_that_was_repeated_the_last_answer_counts(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    lines = [{"epoch": 1, "prompt": "a", "answer": text} for text in ("old", "new")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (strip,) = samples_of(path).prompts
    assert [answer.pieces[0].text for answer in strip.answers] == ["new"]


def test_answers_within_an_epoch_lie_between_those_of_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    places: list[dict[str, float]] = [{"epoch": 1}, {"epoch": 0.5, "step": 3}, {"epoch": 0}]
    lines = [{**place, "prompt": "a", "answer": str(place["epoch"])} for place in places]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (strip,) = samples_of(path).prompts
    assert [(each.epoch, each.step) for each in strip.answers] == [(0, None), (0.5, 3), (1, None)]


def test_any_file_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    assert samples_of(path).prompts == []
    many = [{"epoch": 0, "prompt": f"p{n}", "answer": "a\x1b"} for n in range(MOST_PROMPTS + 3)]
    odd = [b"x", b"[]", b'{"epoch": "1", "prompt": 2}', b'{"answer": "' + b"y" * 10_000_000 + b'"}']
    path.write_bytes(b"\n".join([*odd, *(json.dumps(each).encode() for each in many)]) + b"\n{")
    found = samples_of(path)
    assert len(found.prompts) == MOST_PROMPTS
    assert found.left_out == len(odd) + 3
    assert found.prompts[0].answers[0].pieces[0].text == "a\\x1b"


def test_long_answers_are_compared_as_wholes() -> None:
    long = "word " * 5000
    assert [piece.changed for piece in changes(long, long + "end")] == [True]
    assert [piece.changed for piece in changes(long, long)] == [False]
