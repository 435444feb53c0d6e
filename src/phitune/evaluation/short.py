"""The short evaluation at the end of `phitune train`: a few validation rows, seconds of work.

What it does is bounded by tokens, so that the same run gives the same file; the bound grows with
the size of the training, and shrinks with that of the model. What did not fit is said. Nothing that
goes wrong here fails the run, which is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phitune.config import Settings
from phitune.data.packing import steps_per_epoch
from phitune.data.prepare import PreparedData
from phitune.data.prompt import PromptFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError
from phitune.evaluation.answers import answer_rows
from phitune.evaluation.as_json import measures_as_json
from phitune.evaluation.evaluate import (
    LOSS,
    STOP_RATE,
    Measure,
    answer_measures,
    choose,
    loss_measures,
)
from phitune.evaluation.losses import row_losses
from phitune.evaluation.view import figure
from phitune.inference.served import ServedAdapter, ServedModel
from phitune.model.allocation import in_usable_thread, is_out_of_memory
from phitune.model.decoder import Decoder
from phitune.model.files import find_model
from phitune.model.lora import Adapter, put_on
from phitune.run_rows import DataRows, digest_of
from phitune.training.events import Outcome
from phitune.training.rundir import RunDirectory

ROWS = 20
_READ_AT_MOST = 50_000  # rows of the data set, to find the texts of those that are answered
MOST_NEW_TOKENS = 128
# Some seconds of forward passes of one kind of device; a token takes two a weight.
_FLOPS = {"cpu": 2e11}
_FLOPS_ELSEWHERE = 2e13
# A longer training may be followed by a longer look at it: so much of the tokens it went through.
_SHARE_OF_TRAINING = 0.002


@dataclass(frozen=True)
class _Part:
    """What can be done within the bound."""

    rows: list[int]  # numbers of validation rows, for the losses
    answered: list[int]  # those of them that are answered
    max_new_tokens: int
    skipped: list[str]


def evaluate_at_end(
    settings: Settings,
    decoder: Decoder,
    adapter: Adapter,
    tokenizer: TextTokenizer,
    prompt_format: PromptFormat,
    data: PreparedData,
    outcome: Outcome,
    run: RunDirectory,
) -> list[str]:
    """Base against the trained adapter, which is put back where it was.

    Returns: lines for people; evaluation.json is written.
    """
    rows = data.validation_rows
    if not len(rows):
        return ["evaluation: left out, there are no validation rows"]
    trained = data.train_rows.num_tokens * outcome.steps
    trained //= steps_per_epoch(len(data.train_rows), settings.rows_per_step)
    part = _within(data, bound_of(decoder, trained), settings)
    served = ServedModel(
        settings.model_name,
        find_model(settings.model_name),
        decoder,
        tokenizer,
        prompt_format,
        [ServedAdapter(str(run.path), run.adapter, adapter, prompt_format, tokenizer)],
    )
    measures: list[Measure] = []
    try:
        measures = in_usable_thread(lambda: _measure(served, data, part, settings))
    except DataError as error:
        part.skipped.append(f"all of it: the data can no longer be read ({error})")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        part.skipped.append("all of it: out of memory")
    finally:
        put_on(decoder, adapter)
    run.write_evaluation(
        {
            "validation_rows": len(rows),
            "validation_rows_digest": digest_of(rows),
            "rows_evaluated": len(part.rows),
            "rows_answered": len(part.answered),
            "max_new_tokens": part.max_new_tokens,
            "seed": settings.seed,
            "measures": measures_as_json(measures),
            "skipped": part.skipped,
        }
    )
    return _lines(measures, part, run)


def bound_of(decoder: Decoder, trained_tokens: int) -> int:
    """Tokens that may be computed."""
    weights = sum(linear.weight.numel() for linear in set(decoder.fused_linears().values()))
    flops = _FLOPS.get(decoder.device.type, _FLOPS_ELSEWHERE)
    return int(max(flops / (2 * weights), _SHARE_OF_TRAINING * trained_tokens))


def _within(data: PreparedData, bound: int, settings: Settings) -> _Part:
    """Half of the bound for the losses of both models, half for their answers."""
    rows, skipped = data.validation_rows, []
    near = int(np.searchsorted(rows.indices, _READ_AT_MOST)) or len(rows)
    chosen = choose(near, ROWS, settings.seed)
    lengths, trained = rows.lengths(), rows.trained()
    kept, tokens = [], 0
    for row in chosen:
        tokens += 2 * int(lengths[row])
        if tokens > bound // 2:
            break
        kept.append(row)
    if len(kept) < len(chosen):
        skipped.append(f"{len(chosen) - len(kept)} of {len(chosen)} rows, to end in seconds")
    limit = settings.sample_tokens and min(
        MOST_NEW_TOKENS, max((2 * int(trained[row]) + 8 for row in kept), default=0)
    )
    answered, tokens = [], 0
    for row in kept if limit else []:
        tokens += 2 * (int(lengths[row]) + limit)
        if tokens > bound // 2:
            break
        answered.append(row)
    if not settings.sample_tokens:
        skipped.append("answers, as sample_tokens is 0")
    elif len(answered) < len(kept):
        skipped.append(f"{len(kept) - len(answered)} answers, to end in seconds")
    return _Part(kept, answered, limit, skipped)


def _measure(
    served: ServedModel, data: PreparedData, part: _Part, settings: Settings
) -> list[Measure]:
    def silent(what: str, done: int, total: int) -> None:
        pass

    rows, measures = data.validation_rows, []
    if part.rows:
        losses = row_losses(served, [rows[row] for row in part.rows], len(part.rows), silent)
        measures += loss_measures(losses, settings.seed)
    source = DataRows.of_run(rows, settings, served.format_of(0))
    answers = answer_rows(served, source.examples(part.answered), part.max_new_tokens, silent)
    if answers:
        measures += answer_measures(answers, settings.seed)
    return measures


def _lines(measures: Sequence[Measure], part: _Part, run: RunDirectory) -> list[str]:
    by_name = {measure.name: measure for measure in measures}
    said = []
    if LOSS in by_name:
        loss = by_name[LOSS]
        said.append(
            f"loss {figure(loss.comparison.base)} -> {figure(loss.comparison.tuned)}"
            f" ({loss.reading})"
        )
    if STOP_RATE in by_name:
        stop = by_name[STOP_RATE].comparison
        said.append(
            f"answers that stop {figure(stop.base, 'share')} -> {figure(stop.tuned, 'share')}"
        )
    lines = [f"evaluation on {len(part.rows)} validation rows: " + ", ".join(said)] if said else []
    if part.skipped:
        lines.append(f"evaluation: left out are {'; '.join(part.skipped)}")
    return [*lines, f"more of it: phitune evaluate --adapter_path {run.path}"]
