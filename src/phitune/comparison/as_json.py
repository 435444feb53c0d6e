"""A comparison as JSON: everything that the table and the page show, and the numbers whole."""

import math
from dataclasses import asdict
from typing import Any

from phitune import __version__
from phitune.comparison.sentences import Asked
from phitune.inference.compare import Cell, Comparison, Row
from phitune.inference.scores import NORMALISATION


def as_json(comparison: Comparison, asked: Asked) -> dict[str, Any]:
    """Plain types alone; what is not known, or not a finite number, is null."""
    return {
        "phitune": __version__,
        "model_name": asked.model_name,
        "questions_from": asked.source,
        "max_new_tokens": asked.max_new_tokens,
        "sampling": asdict(asked.sampling),
        "notes": list(asked.notes),
        "normalisation": NORMALISATION,
        "columns": [
            {
                "name": column.name,
                "adapter_path": column.path,
                "prompt_format": column.prompt_format,
            }
            for column in comparison.columns
        ],
        "questions": [_question(row, comparison) for row in comparison.rows],
        "summary": [_summary(comparison, index) for index in range(len(comparison.columns))],
    }


def _question(row: Row, comparison: Comparison) -> dict[str, Any]:
    return {
        "number": row.number,
        "place": row.question.place or None,
        "turns": [asdict(turn) for turn in row.question.turns],
        "expected": row.question.expected,
        "answers": [
            {"name": column.name, **_answer(cell), "differs": row.differs(index)}
            for index, (column, cell) in enumerate(zip(comparison.columns, row.cells, strict=True))
        ],
    }


def _answer(cell: Cell) -> dict[str, Any]:
    likely = cell.likelihood
    return {
        "answer": cell.text,
        "tokens": cell.tokens,
        "stopped": cell.stopped,
        "exact": cell.exact,
        "match": cell.match,
        "nll": _finite(likely.nll) if likely else None,
        "nll_per_token": _finite(likely.per_token) if likely else None,
        "expected_tokens": likely.tokens if likely else None,
    }


def _summary(comparison: Comparison, index: int) -> dict[str, Any]:
    summary = comparison.summary(index)
    count = summary.questions
    return {
        "name": comparison.columns[index].name,
        **asdict(summary),
        "stop_rate": summary.stopped / count if count else None,
        "mean_nll": _finite(summary.mean_nll),
        "nll_per_token": _finite(summary.nll_per_token),
        "differs": list(summary.differs),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
