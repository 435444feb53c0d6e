"""An evaluation in plain types, for --json, --output and the run directory."""

import math
from dataclasses import asdict
from typing import Any

from phitune import __version__
from phitune.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from phitune.evaluation.evaluate import Evaluation, Measure, Wanted
from phitune.evaluation.general import THRESHOLDS, Forgetting
from phitune.evaluation.metrics import METRICS


def as_json(evaluation: Evaluation, wanted: Wanted, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured, with each answer.

    Args:
        about: what was evaluated, put first.
    """
    general = evaluation.general
    recorded = evaluation.recorded
    return {
        "phitune": __version__,
        **about,
        "seed": wanted.seed,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "measures": measures_as_json(evaluation.measures),
        "recorded_by_the_run": {"base": recorded[0], "tuned": recorded[1]} if recorded else None,
        "general_text": general_as_json(general) if general else None,
        "notes": list(evaluation.notes) + list(general.notes if general else ()),
        "answers": [
            {
                **asdict(answer),
                "metrics": {
                    name: {
                        "base": METRICS[name](answer.base.text, answer.expected),
                        "tuned": METRICS[name](answer.tuned.text, answer.expected),
                    }
                    for name in evaluation.metrics
                },
            }
            for answer in evaluation.answers
        ],
    }


def measures_as_json(measures: tuple[Measure, ...] | list[Measure]) -> dict[str, Any]:
    """By name: both figures, their difference and what is to be thought of it."""
    return {measure.name.replace(" ", "_"): _measure(measure) for measure in measures}


def general_as_json(general: Forgetting) -> dict[str, Any]:
    return {
        "text": general.name,
        "tokens": general.tokens,
        "windows": general.windows,
        **_measure(Measure(general.name, general.loss, "lower")),
        "perplexity_ratio": finite(general.ratio),
        "verdict": general.verdict,
        "thresholds": THRESHOLDS,
    }


def finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _measure(measure: Measure) -> dict[str, Any]:
    comparison = measure.comparison
    interval = None
    if comparison.low is not None and comparison.high is not None:
        interval = [finite(comparison.low), finite(comparison.high)]
    return {
        "base": finite(comparison.base),
        "tuned": finite(comparison.tuned),
        "difference": finite(comparison.difference),
        "interval": interval,
        "rows": comparison.rows,
        "reading": measure.reading,
    }
