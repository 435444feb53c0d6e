"""A training run: from a model in memory to a finished run directory.

The trainer gathers what a run is made of; from here on there is something to lose. The worst
micro-batch is rehearsed before the directory is touched, and whatever the loop tells is written
down by the recorder.
"""

import datetime
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from phitune.config import Resolved, Settings, to_yaml
from phitune.data.coder import Coder
from phitune.data.prepare import PreparedData, facts_of
from phitune.errors import CheckpointError, NonFiniteError
from phitune.export.card import write_adapter_card
from phitune.inference.answers import Sample, Sampler
from phitune.inference.evaluate import evaluate_at_end
from phitune.model.decoder import Decoder
from phitune.model.device import (
    compile_seconds,
    give_back_memory,
    hold_reserve,
    release_freed_memory,
)
from phitune.model.engine import Engine
from phitune.model.lora import Adapter, compare_with_memory
from phitune.plan.machine import ProcessMemoryLimit
from phitune.recorder import Recorder
from phitune.training.checkpoint import checkpoints_of
from phitune.training.interrupt import Stop, stop_signals
from phitune.training.loop import Outcome, rehearse, start_state, train
from phitune.training.out_of_memory import Attempts, Shortage
from phitune.training.progress import answers_table, open_trackers, open_view
from phitune.training.resume import Provenance, Resumption, with_absolute_paths
from phitune.training.rundir import RunDirectory
from phitune.training.saver import Saver
from phitune.training.state import TrainingState


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    decoder: Decoder
    adapter: Adapter
    engine: Engine
    coder: Coder
    data: PreparedData


class TrainingRun:
    """A run, new or gone on with, whose directory is locked by this process."""

    def __init__(
        self,
        parts: Parts,
        resolved: Resolved,
        provenance: Provenance,
        resumption: Resumption | None,
        limit_on_process: ProcessMemoryLimit,
        console: Console,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            console, say: for tables, and for lines.
        """
        self.parts, self.resumption = parts, resumption
        self.resolved, self.provenance = resolved, provenance
        self.console, self._say = console, say
        self._ceiling = limit_on_process
        self._directory: RunDirectory | None = None
        self._saver: Saver | None = None

    @property
    def settings(self) -> Settings:
        return self.resolved.settings

    def train(self) -> Outcome:
        """The whole run.

        Raises:
            PhituneError: what went wrong; its message says what to do.
            KeyboardInterrupt: it was interrupted; what there was is saved.
        """
        parts, resumption = self.parts, self.resumption
        rows = len(parts.data.train_rows)
        state = start_state(parts.engine, parts.adapter, rows, self.settings)
        self._rehearse(state)
        run = self._open_directory()
        facts = facts_of(parts.data)  # Now, while the files are what was read.
        if resumption:
            state.load(resumption.state["progress"], resumption.files)
            resumption.files.clear()  # Three or four times the adapter.
        with stop_signals(self._say) as stop:
            recorder = self._recorder(run, state, stop)
            if resumption:
                self._rewind(resumption, run, recorder, state)
            run.write_config(to_yaml(with_absolute_paths(self.resolved)))
            self._saver = saver = Saver(
                run,
                self.settings,
                self.provenance,
                self._say,
                resumption.state["seconds"] if resumption else 0.0,
                resumption.checkpoint.name if resumption else None,
            )
            try:
                outcome = self._loop(run, state, recorder, saver, stop)
            finally:
                recorder.close()
            give_back_memory(parts.engine.device)  # What comes now needs other pieces of it.
            self._write_what_waits(run, recorder)
        compare_with_memory(parts.adapter, run.adapter)
        if compiling := compile_seconds():
            self._say(f"torch_compile: compiling took {compiling:.1f} s of it")
        self._conclude(outcome, run, recorder, saver.training_seconds, facts)
        if saver.problem:
            raise CheckpointError(
                f"the last checkpoint could not be written: {saver.problem}; the adapter is whole:"
                f" {run.adapter}"
            )
        if outcome.interrupted:
            steps = self.settings.epochs * state.steps_per_epoch
            raise stop.interrupted(
                f"interrupted by {stop.signal} after step {outcome.steps} of {steps}; go on with:"
                f" {go_on_command(run)}"
            )
        return outcome

    def _rehearse(self, state: TrainingState) -> None:
        """Finds the cut in which the worst of the run fits, before anything is done."""
        settings, data = self.settings, self.parts.data
        size = settings.micro_batch
        train_rows = data.train_rows.longest_rows(size)
        validation_rows = data.validation_rows.longest_rows(size)
        step = self.resumption.state["progress"]["step"] if self.resumption else 0

        def tell(shortage: Shortage) -> None:
            self._memory_ran_out(replace(shortage, after_step=step))

        hold_reserve()
        attempts = Attempts(self.parts.engine, state, size, settings.rows_per_step, tell)
        rehearsed = attempts(
            lambda: rehearse(
                self.parts.engine,
                state,
                train_rows,
                validation_rows,
                settings,
                attempts.cut.micro_batch,
            )
        )
        release_freed_memory()  # Threads and small things come next.
        self._say(str(rehearsed))

    def _memory_ran_out(self, shortage: Shortage) -> None:
        """Writes down what the run goes on with, and says so."""
        self._ceiling.renew()
        if shortage.now != shortage.then:
            self._take_over(shortage)
        self._say(
            f"warning: out of memory ({shortage.why}); it goes on from the same step with the same"
            f" effective batch: {shortage}"
        )

    def _take_over(self, shortage: Shortage) -> None:
        then, now = (
            cut.settings(self.settings.rows_per_step) for cut in (shortage.then, shortage.now)
        )
        self.resolved = self.resolved.choose(**dict(now.items() - then.items()))
        self.provenance = self.provenance.narrowed(shortage, self.resolved)
        if self._saver:
            self._saver.provenance = self.provenance
        if self._directory:
            try:
                self._directory.write_config(to_yaml(with_absolute_paths(self.resolved)))
            except OSError as error:
                self._say(f"warning: config.yaml cannot be written: {error.strerror or error}")

    def _open_directory(self) -> RunDirectory:
        assert self.settings.output_dir
        open_run = RunDirectory.take_up if self.resumption else RunDirectory
        self._directory = open_run(self.settings.output_dir, self._say)
        return self._directory

    def _recorder(self, run: RunDirectory, state: TrainingState, stop: Stop) -> Recorder:
        parts, settings = self.parts, self.settings
        sampler = Sampler(
            parts.decoder,
            parts.coder,
            parts.data.sample_prompts,
            settings.sample_tokens,
        )
        first_step = state.step + 1 if self.resumption else 0
        return Recorder(
            run,
            open_view(self.console),
            open_trackers(settings.report_to, run.path, first_step),
            sampler,
            parts.adapter,
            parts.coder,
            # The adapter names its base, and means the same from any folder.
            self.provenance.effective.settings.model_name,
            parts.data,
            self._memory_ran_out,
            stop,
            self._say,
        )

    def _loop(
        self,
        run: RunDirectory,
        state: TrainingState,
        recorder: Recorder,
        saver: Saver,
        stop: Stop,
    ) -> Outcome:
        settings, data = self.settings, self.parts.data
        rows = len(data.train_rows)
        steps = settings.epochs * state.steps_per_epoch
        recorder.start(steps, settings.epochs * rows, state.step, state.rows_seen(rows, settings))
        try:
            return train(
                self.parts.engine,
                self.parts.adapter,
                data.train_rows,
                data.validation_rows,
                settings,
                recorder,
                stop,
                state,
                saver,
            )
        except NonFiniteError as error:
            if not run.adapter.exists():
                recorder.save_adapter()
            remedy = (
                f"\nThe last good adapter is in {run.adapter}. Look at the rows that are named, try"
                " --precision fp32"
            )
            if checkpoints_of(run.checkpoints):
                rate = settings.learning_rate / 2
                remedy += (
                    ", or go on from before it with half the rate:"
                    f" {go_on_command(run)} --resume_with learning_rate={rate:g}"
                )
            else:  # Nothing was learnt yet.
                remedy += ", or get the model's files again"
            raise NonFiniteError(f"{error}{remedy}") from None

    def _rewind(
        self, resumption: Resumption, run: RunDirectory, recorder: Recorder, state: TrainingState
    ) -> None:
        """Takes back what was written after the checkpoint; the run is as it was then."""
        for warning in [*resumption.notes, *run.rewind(resumption.state["logs"])]:
            self._say(f"warning: {warning}")
        resumption.set_damaged_aside()
        recorder.recall_base_samples()
        recorder.put_back_adapter(state.best)
        self._say(f"going on from {resumption.checkpoint}: step {state.step} is done")

    def _write_what_waits(self, run: RunDirectory, recorder: Recorder) -> None:
        """
        Raises:
            CheckpointError: the disk is still full or gone, so this is no success.
        """
        try:
            if recorder.adapter_waits or not run.adapter.exists():
                recorder.save_adapter()
            run.lengths()
        except OSError as error:
            raise CheckpointError(
                f"{run.path}: what came out cannot be written: {error.strerror or error}; make"
                f" room, then go on from the last checkpoint with: {go_on_command(run)}"
            ) from None

    def _conclude(
        self,
        outcome: Outcome,
        run: RunDirectory,
        recorder: Recorder,
        seconds: float,
        facts: dict[str, Any],
    ) -> None:
        """Answers the sample prompts with the best adapter, and writes and prints what came out."""
        parts, base_samples = self.parts, recorder.base_samples
        tuned = [] if outcome.interrupted else recorder.sample()
        unstopped = sum(not sample.stopped for sample in tuned)
        summary = {
            **asdict(outcome),
            "seconds": round(seconds, 3),
            "data": facts,
            "changes": self.provenance.changes,
            "trainable_parameters": parts.adapter.num_parameters,
            "answers": [
                {"prompt": old.prompt, "base": old.answer, "tuned": new.answer}
                for old, new in zip(base_samples, tuned, strict=False)
            ],
            "answers_stopped_by_themselves": len(tuned) - unstopped,
        }
        evaluation: list[str] = []
        if not outcome.interrupted:
            evaluation = evaluate_at_end(
                self.settings,
                parts.decoder,
                parts.adapter,
                parts.coder,
                parts.data,
                outcome,
                run,
            )
        write_adapter_card(run.path, summary)
        run.write_summary(summary)  # Last: a run that has one is finished.
        self._show(outcome, run, base_samples, tuned, seconds)
        for line in evaluation:
            self._say(line)

    def _show(
        self,
        outcome: Outcome,
        run: RunDirectory,
        base_samples: list[Sample],
        tuned: list[Sample],
        seconds: float,
    ) -> None:
        if tuned and base_samples:
            self.console.print()
            self.console.print(answers_table(base_samples, tuned))
        if unstopped := sum(not sample.stopped for sample in tuned):
            self._say(
                f"warning: {unstopped} of {len(tuned)} answers did not stop by themselves within"
                f" {self.settings.sample_tokens} tokens"
            )
        first, best = outcome.first_validation_loss, outcome.best_validation_loss
        figures, which = "", ""
        if first is not None and best is not None:
            figures, which = f", validation loss {first:.4f} -> {best:.4f}", " (the best)"
        duration = datetime.timedelta(seconds=round(seconds))
        self._say(
            f"{outcome.ended}: {outcome.steps} steps in {duration}{figures}\n"
            f"adapter of step {outcome.best_step}{which}: {run.adapter}"
        )


def go_on_command(run: RunDirectory) -> str:
    """What goes on with a run."""
    return f"phitune train --resume {shlex.quote(str(run.path))}"
