"""HTML pages: whatever a text holds, it is shown and does nothing."""

import jinja2
import pytest

from phitune.commands.page import _environment, render


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
