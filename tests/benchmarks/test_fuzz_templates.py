"""Some chat templates from random pieces on every run; `benchmarks/fuzz_templates.py` tries
thousands."""

from fuzz_templates import campaign


def test_a_template_gives_the_ids_of_transformers_or_is_refused_by_the_construct() -> None:
    found = campaign(60, start=100_000)
    assert found["equal"] > 60, found
    assert found["templates used"] > 10, found
