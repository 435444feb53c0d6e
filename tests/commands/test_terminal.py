"""Results as JSON, and as pages."""

import io
import json
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import jinja2
import numpy as np
import pytest

from phitune.commands.terminal import _environment, json_text, jsonable, print_json, render


class Verdict(Enum):
    OK = "ok"


@dataclass(frozen=True)
class Part:
    name: str
    share: float | None


@dataclass(frozen=True)
class Result:
    parts: tuple[Part, ...]
    verdict: Verdict
    path: Path
    by_length: dict[int, Part]


def test_a_result_is_an_object_of_its_fields() -> None:
    part = Part("a", 0.5)
    result = Result((part,), Verdict.OK, Path("data/a.json"), {8: Part("b", None)})
    assert jsonable(result) == {
        "parts": [{"name": "a", "share": 0.5}],
        "verdict": "ok",
        "path": "data/a.json",
        "by_length": {"8": {"name": "b", "share": None}},
    }


def test_numbers_that_are_not_finite_are_null() -> None:
    numbers = {"nan": float("nan"), "inf": -float("inf"), "numpy": np.float32("nan"), "one": 1.0}
    assert jsonable(numbers) == {"nan": None, "inf": None, "numpy": None, "one": 1.0}


def test_numbers_of_numpy_are_plain_ones() -> None:
    plain = jsonable([np.int64(3), np.float64(0.5), np.bool_(True), np.array([[1, 2]])])
    assert plain == [3, 0.5, True, [[1, 2]]]
    assert [type(item) for item in plain] == [int, float, bool, list]


@pytest.mark.parametrize("value", [object(), {1.5: "key"}, Part, {3, 4}])
def test_what_has_no_form_in_json_is_a_mistake(value: object) -> None:
    with pytest.raises(TypeError, match="JSON"):
        jsonable(value)


def test_letters_stay_letters_where_the_output_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json_text(["é"]) == '[\n  "é"\n]'
    for encoding, written in (("utf-8", "é".encode()), ("ascii", b"\\u00e9")):
        stream = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding=encoding))
        print_json(["é", "\U0001f600"])
        sys.stdout.flush()
        assert written in stream.getvalue()
        assert json.loads(stream.getvalue()) == ["é", "\U0001f600"]


# -------------------------------------------------------------------------------------------------
# HTML pages: whatever a text holds, it is shown and does nothing.


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("<b>&\"'", "&lt;b&gt;&amp;&#34;&#39;"),
        ("\x1b[31m\u202eevil", r"\x1b[31m\u202eevil"),
        ("{{ 7 * 7 }}{% raw %}", "{{ 7 * 7 }}{% raw %}"),
        (12, "12"),
        (["<i>", "\x07"], r"[&#39;&lt;i&gt;&#39;, &#39;\x07&#39;]"),
    ],
)
def test_every_expression_is_escaped_and_visible(value: object, shown: str) -> None:
    template = _environment().from_string(
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice(value) }}"
    )
    assert template.render(value=value) == shown * 2


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("comparison.html.j2")
