"""The report for machines. The keys are stable; docs/data.md lists them.

Names say what is counted: `_tokens`, `_rows`, `_share` (of 1). The texts of the samples are in it,
so the file is as confidential as the data.
"""

from dataclasses import asdict
from typing import Any

from phitune import __version__
from phitune.report.findings import Finding
from phitune.report.near_duplicates import PERMUTATIONS, THRESHOLD
from phitune.report.report import Report
from phitune.report.samples import Sample
from phitune.report.statistics import Histogram, TokenStatistics
from phitune.report.words import WORDS_OF_A_SHINGLE


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as what `json` can write."""
    return {
        "phitune_version": __version__,
        "verdict": report.verdict,
        "source": report.source,
        "validation_source": report.validation_source,
        "files": report.files,
        "formats": list(report.formats),
        "notes": list(report.notes),
        "rows": {
            "usable_rows": report.rows,
            "unusable_rows": report.unreadable_rows,
            "train_rows": report.train_rows,
            "validation_rows": report.validation_rows,
        },
        "model_name": report.model_name,
        "prompt_format": report.prompt_format,
        "train_on_prompt": report.train_on_prompt,
        "tokens": _tokens(report.tokens, report.epochs) if report.tokens else None,
        "no_tokens_because": report.no_tokens_because,
        "words": asdict(report.words),
        "characters": asdict(report.characters),
        "letters_share_by_script": {name: round(x, 6) for name, x in report.scripts.items()},
        "near_duplicates": {
            "rows_compared": report.rows_compared,
            "words_of_a_shingle": WORDS_OF_A_SHINGLE,
            "permutations": PERMUTATIONS,
            "least_jaccard_similarity": THRESHOLD,
        },
        "checks": [_finding(finding) for finding in report.findings],
        "samples": [_sample(sample) for sample in report.samples],
    }


def _tokens(tokens: TokenStatistics, epochs: int) -> dict[str, Any]:
    lengths = {
        "prompt_tokens": tokens.prompt,
        "answer_tokens": tokens.answer,
        "row_tokens": tokens.row,
        "row_tokens_with_end_tokens": tokens.row_with_end,
    }
    return {
        **{name: asdict(value) for name, value in lengths.items()},
        "answer_share": tokens.answer_share,
        "histograms": {
            f"{name}_tokens": _histogram(histogram) for name, histogram in tokens.histograms.items()
        },
        "max_length_tokens": tokens.max_length,
        "rows_longer_than_max_length": tokens.rows_too_long,
        "max_length_tokens_that_keep": {
            f"{share:.0%}": length for share, length in tokens.kept_by.items()
        },
        "epoch": {
            "train_rows": tokens.epoch_rows,
            "tokens": tokens.epoch_tokens,
            "trained_tokens": tokens.epoch_trained_tokens,
        },
        "epochs": epochs,
        "padding_share_of_padding_tools": {
            "padded_to_max_length": tokens.padding.to_max_length,
            "padded_to_longest_of_batch": tokens.padding.to_longest_of_batch,
            "batch_size": tokens.padding.batch_size,
        },
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {
        "width_tokens": histogram.width,
        "rows": list(histogram.counts),
        "rows_beyond": histogram.beyond,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "title": finding.title,
        "verdict": finding.verdict,
        "rows": finding.rows,
        "said": finding.said,
        "places": [{"file": str(place.file), "line": place.line} for place in finding.places],
        "details": list(finding.details),
        "remedy": finding.remedy,
    }


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "title": sample.title,
        "file": str(sample.place.file),
        "line": sample.place.line,
        "tokens": sample.tokens,
        "trained_tokens": sample.trained_tokens,
        "spans": [asdict(span) for span in sample.spans],
    }
