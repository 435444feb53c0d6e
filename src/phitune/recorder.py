"""What happens in the training loop, written to the run directory, to trackers and to the view."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from phitune.data.coder import Coder
from phitune.data.prepare import PreparedData
from phitune.errors import SavedAdapterError, listing
from phitune.inference.answers import Sample, Sampler
from phitune.model.device import give_back_memory, in_usable_thread, is_out_of_memory
from phitune.model.lora import Adapter, compare_with_memory, save_adapter
from phitune.training.interrupt import Stop
from phitune.training.loop import BadNumbers, Evaluation, Spike, StepMetrics
from phitune.training.out_of_memory import Shortage, why_not_written
from phitune.training.progress import Tracker, View
from phitune.training.rundir import RunDirectory
from phitune.training.state import copy_of, restore

# Samples shown on the way; all of them are in samples.jsonl.
_SHOWN = 2


class Recorder:
    """The `Events` of a run; see `training.events`."""

    def __init__(
        self,
        run: RunDirectory,
        view: View,
        trackers: Sequence[Tracker],
        sampler: Sampler,
        adapter: Adapter,
        coder: Coder,
        model_name: str,
        data: PreparedData,
        ran_out: Callable[[Shortage], None],
        stop: Stop,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            data: whose rows are named where something is wrong with them.
            ran_out: told when memory ran out.
            say: told what cannot be written at the time, and what went wrong.
        """
        self.base_samples: list[Sample] = []
        self.adapter_waits = False  # It could not be written when it was the best.
        self._stop = stop
        self._say = say
        self._run = run
        self._view = view
        self._trackers = trackers
        self._sampler = sampler
        self._adapter = adapter
        self._coder = coder
        self._model_name = model_name
        self._data = data
        self._ran_out = ran_out

    def start(self, total_steps: int, total_sequences: int, steps: int, sequences: int) -> None:
        """See `View.start`."""
        self._view.start(total_steps, total_sequences, steps, sequences)

    def micro_batch_done(self, sequences: int) -> None:
        with self._stop.showing():
            self._view.micro_batch_done(sequences)

    def step_done(self, metrics: StepMetrics) -> None:
        self._log(asdict(metrics))
        with self._stop.showing():
            self._view.step_done(metrics)

    def numbers_refused(self, bad: BadNumbers) -> None:
        part = self._data.validation_rows if bad.is_validation else self._data.train_rows
        rows = [part.place(row) for row in bad.rows]
        numbers = {"loss": str(bad.loss)}  # JSON has no word for them.
        if not bad.is_validation:
            numbers["grad_norm"] = str(bad.grad_norm)
        self._log_incident(bad.step, bad.epoch, "not_finite", numbers, rows)
        with self._stop.showing():
            self._say(f"warning: {bad}\n{bad.whose}\n{listing(rows)}")

    def loss_leapt(self, spike: Spike) -> None:
        rows = [self._data.train_rows.place(row) for row in spike.rows]
        numbers = {"loss": spike.loss, "usual": spike.usual}
        self._log_incident(spike.step, spike.epoch, "leapt", numbers, rows)
        with self._stop.showing():
            self._say(
                f"warning: step {spike.step}: the loss leapt to {spike.loss:.4f}, from about"
                f" {spike.usual:.4f} in the steps before; training goes on. Its rows are in"
                f" {self._run.metrics}"
            )

    def memory_ran_out(self, shortage: Shortage) -> None:
        now = {"memory_ran_out": shortage.why, **asdict(shortage.now)}
        self._run.append_metrics({"step": shortage.after_step, **now})
        with self._stop.showing():
            self._view.micro_batch_done(-shortage.rows_given_up)
            self._ran_out(shortage)

    def evaluating(self, done: int, sequences: int) -> None:
        with self._stop.showing():
            self._view.evaluating(done, sequences)

    def epoch_done(self, epoch: int, evaluation: Evaluation | None, *, is_best: bool) -> None:
        if evaluation:
            with self._stop.showing():
                self._view.evaluated(evaluation, is_best=is_best)
        if is_best:
            self._try_to_save_adapter()
        samples = self.sample(self._stop.check)
        # Written down together, when nothing can interrupt any more: an epoch is over or it is not.
        if evaluation:
            self._log(asdict(evaluation))
        for sample in samples:
            self._run.append_sample({"epoch": epoch, **asdict(sample)})
        with self._stop.showing():
            self._view.sampled(epoch, samples[:_SHOWN])
        if epoch == 0:
            self.base_samples = samples

    def sample(self, check: Callable[[], None] = lambda: None) -> list[Sample]:
        """Answers to the sample prompts; none where there is no memory for them.

        Args:
            check: called after each token, and free to raise.
        """
        try:
            return in_usable_thread(lambda: self._sampler(check))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        give_back_memory(self._adapter.parameters()[0].device)
        self._say("warning: there is no memory for the answers to the sample prompts; left out")
        return []

    def save_adapter(self) -> None:
        """Replaces the run's adapter by the one in training, ready for PEFT and for servers."""

        def write(folder: Path) -> None:
            save_adapter(self._adapter, folder, self._model_name)
            self._coder.save(folder)

        self._run.replace_adapter(write)

    def _try_to_save_adapter(self) -> None:
        try:
            self.save_adapter()
        except (OSError, MemoryError, RuntimeError) as error:
            self.adapter_waits = True
            self._say(
                f"warning: {self._run.adapter}: cannot be written: {why_not_written(error)};"
                " training goes on, and it is tried again"
            )
        else:
            self.adapter_waits = False

    def recall_base_samples(self) -> None:
        """The base's answers, of a run that was begun by another process."""
        samples = self._run.samples(epoch=0)
        if [sample["prompt"] for sample in samples] == self._sampler.prompts:
            names = [field.name for field in fields(Sample)]
            self.base_samples = [Sample(*(line[name] for name in names)) for line in samples]

    def put_back_adapter(self, best: dict[str, Tensor]) -> None:
        """Makes the run's adapter the best one of a checkpoint again, or none."""
        if not best:
            shutil.rmtree(self._run.adapter, ignore_errors=True)
            return
        now = copy_of(self._adapter)
        restore(self._adapter, best)
        try:
            compare_with_memory(self._adapter, self._run.adapter)
        except SavedAdapterError:
            self.save_adapter()
        finally:
            restore(self._adapter, now)

    def close(self) -> None:
        with self._stop.showing():
            self._view.close()
        for tracker in self._trackers:
            tracker.close()

    def _log_incident(
        self, step: int, epoch: int, what: str, numbers: dict[str, Any], places: list[str]
    ) -> None:
        # Without the folder: a run that goes on may have its data in another place.
        rows = [Path(place).name for place in places]
        self._run.append_metrics({"step": step, "epoch": epoch, what: numbers, "rows": rows})

    def _log(self, metrics: dict[str, Any]) -> None:
        self._run.append_metrics(metrics)
        for tracker in self._trackers:
            tracker.log(metrics)
