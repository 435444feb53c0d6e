"""A short run of benchmarks/fuzz_serve.py: odd requests, none of them answered wrongly."""

import fuzz_serve
from helpers.serving import model_with, running

from phitune.serving.app import ServerLimits


def test_odd_requests_are_refused_in_the_apis_own_form() -> None:
    limits = ServerLimits(body_seconds=0.2)
    with running(model_with(name="tiny-phi-2"), context=128, limits=limits) as server:
        found = fuzz_serve.fuzz(server.url, 300, seed=1)
    assert found["200"] > 20
    assert found["400"] > 100
