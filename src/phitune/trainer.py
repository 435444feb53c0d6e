"""Phi2LoRATrainer, the Python door: the same job as `phitune train`, step by step.

It is where everything meets: settings, data, model, loop and run directory. The order matters:
whatever can be refused is refused before weights are read, and the run directory is not touched
before the model is there.
"""

import datetime
import shlex
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from phitune.config import Resolved, resolve, to_yaml
from phitune.data.conversation import Turn
from phitune.data.prepare import PreparedData, facts_of, prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import CheckpointError, NonFiniteError, OutOfMemoryError
from phitune.evaluation.short import evaluate_at_end
from phitune.export.card import write_adapter_card
from phitune.model.architecture import read_model_config
from phitune.model.decoder import Decoder
from phitune.model.device import (
    DTYPES,
    choose_device,
    choose_precision,
    compile_seconds,
    device_name,
    is_out_of_memory,
)
from phitune.model.engine import Engine, FusedEngine, ReferenceEngine
from phitune.model.files import EXAMPLE_DATASET, fetch_weights, find_model
from phitune.model.lora import Adapter, LoraSpec, attach, compare_with_memory
from phitune.model.targets import resolve_targets
from phitune.model.weights import load_decoder, weights_fingerprint
from phitune.recorder import Recorder, Sampler
from phitune.report.short import check_before_training
from phitune.training.budget import memory_advice, memory_budget
from phitune.training.fit import check_against_model, settle_memory
from phitune.training.interrupt import stop_signals
from phitune.training.lock import run_lock
from phitune.training.loop import Outcome, start_state, train
from phitune.training.memory import MemoryPlan
from phitune.training.provenance import (
    Provenance,
    data_fingerprints,
    surroundings,
    with_absolute_paths,
)
from phitune.training.resume import Resumption, take_up
from phitune.training.rundir import RunDirectory, check_output_dir, default_output_dir
from phitune.training.saver import Saver
from phitune.training.state import TrainingState
from phitune.training.tracking import check_tracker, open_trackers
from phitune.training.view import (
    RunConsole,
    Sample,
    answers_table,
    data_line,
    data_progress,
    memory_line,
    model_line,
    open_view,
    settings_lines,
    targets_line,
)


@dataclass(frozen=True)
class PreparedModel:
    """The frozen decoder and the adapter on it."""

    decoder: Decoder
    adapter: Adapter


class Phi2LoRATrainer:
    """Fine-tunes one model on one data set.

        trainer = Phi2LoRATrainer(output_dir="output/my_model", dataset_path="data/train.jsonl")
        outcome = trainer.train()

    Args:
        output_dir, dataset_path, model_name: as the flags of those names.
        config: any other settings by name, or the path of a YAML file with them.

    Raises:
        PhituneError: settings, data or model files that cannot be used.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        dataset_path: str | Path | None = None,
        model_name: str | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
    ) -> None:
        given = {
            "output_dir": output_dir,
            "dataset_path": dataset_path,
            "model_name": model_name,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        config_path = Path(config) if isinstance(config, str | Path) else None
        if isinstance(config, Mapping):
            arguments = {**config, **arguments}
        self._set_up(resolve(arguments, config_path, origin="argument"))

    @classmethod
    def from_settings(cls, resolved: Resolved) -> "Phi2LoRATrainer":
        """A trainer for settings that are resolved already, as the command line has them."""
        trainer = cls.__new__(cls)
        trainer._set_up(resolved)
        return trainer

    def _set_up(self, resolved: Resolved) -> None:
        """Fills in what was left open, and finds the model's folder."""
        self.console: Console = RunConsole(highlight=False)
        self._resumption = take_up(resolved)
        self._asked = with_absolute_paths(resolved)
        if self._resumption:
            resolved, self._asked = self._resumption.effective, self._resumption.asked
        settings = resolved.settings
        device = choose_device(settings.device)
        chosen: dict[str, Any] = {}
        if settings.output_dir is None:
            chosen["output_dir"] = default_output_dir(
                settings.model_name, settings.dataset_path or EXAMPLE_DATASET
            )
        if settings.device == "auto":
            chosen["device"] = str(device)
        if settings.precision == "auto":
            chosen["precision"] = choose_precision(settings.precision, device)
        self.resolved = resolved.choose(**chosen)
        self.settings = self.resolved.settings
        assert self.settings.output_dir
        self._check_output_dir()
        check_tracker(self.settings.report_to)
        self.model_folder = find_model(self.settings.model_name)
        self.model_config = read_model_config(self.model_folder)
        self.tokenizer = TextTokenizer(self.model_folder)
        self.prompt_format = self.tokenizer.prompt_format(self.settings.prompt_format)
        self.target_modules = resolve_targets(
            self.model_config, self.settings.target_modules, self.settings.layers
        )
        check_against_model(
            self.settings, self.model_config, self.tokenizer.size, self.model_folder
        )
        self._model: PreparedModel | None = None

    @property
    def _dataset_path(self) -> Path:
        return self.settings.dataset_path or EXAMPLE_DATASET

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    def format_instruction(self, prompt: str, response: str) -> str:
        """A row as text, the way the model sees it; the end token that follows is not shown."""
        turns = (Turn("user", prompt), Turn("assistant", response))
        segments = self.prompt_format.segments(turns)[:-1]
        return "".join(segment.text for segment in segments)

    def prepare_data(self) -> PreparedData:
        """Reads, checks, splits and tokenises the rows.

        Raises:
            DataError: every problem of the files at once.
        """
        with data_progress(self.console) as progress:
            data = prepare_data(
                self.settings, self._dataset_path, self.tokenizer, self.prompt_format, progress
            )
        for note in data.notes:
            self._say(f"data: {note}")
        for warning in data.warnings:
            self._say(f"warning: {warning}")
        return data

    def prepare_model(self) -> PreparedModel:
        """Loads the base, once, and puts the adapter on it."""
        if self._model is None:
            settings = self.settings
            torch.manual_seed(settings.seed)
            fetch_weights(settings.model_name, self.model_folder)
            decoder = load_decoder(
                self.model_folder,
                self.model_config,
                DTYPES[settings.precision],
                self.device,
            )
            self._base_fingerprint = weights_fingerprint(decoder)
            spec = LoraSpec(
                settings.lora_r, settings.lora_alpha, settings.lora_dropout, self.target_modules
            )
            self._model = PreparedModel(decoder, attach(decoder, spec, settings.seed))
        return self._model

    def train(self) -> Outcome:
        """The whole job: from the data file to the run directory.

        Raises:
            PhituneError: what cannot be used, or went wrong; its message says what to do.
            KeyboardInterrupt: it was interrupted; what there was is saved.
        """
        resumption = self._resumption
        if resumption and resumption.summary:
            return self._finished_before(resumption)
        with ExitStack() as held:
            if resumption:
                held.enter_context(run_lock(resumption.folder))
                resumption.check_unchanged()
            self._check_output_dir()
            data = self.prepare_data()
            coder = (self.tokenizer, self.prompt_format)
            check_before_training(self.settings, self._dataset_path, *coder, data, self._say)
            plan, budget = self._plan_memory(data)
            self._show_settings(data)
            try:
                model, engine = self._load(plan, budget)
                provenance = self._provenance(data, model, engine)
                if not resumption:
                    assert self.settings.output_dir
                    held.enter_context(run_lock(self.settings.output_dir))
                    self._check_output_dir()
                return self._train(model, engine, data, provenance)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise OutOfMemoryError(
                        f"out of memory on {self.settings.device}: {str(error).splitlines()[0]}\n"
                        + memory_advice(self.settings)
                    ) from None
                raise

    def _check_output_dir(self) -> None:
        settings = self.settings
        assert settings.output_dir
        if not self._resumption:
            resuming = settings.resume is not None
            check_output_dir(settings.output_dir, overwrite=settings.overwrite, resuming=resuming)

    def _finished_before(self, resumption: Resumption) -> Outcome:
        assert resumption.summary
        names = [field.name for field in fields(Outcome)]
        outcome = Outcome(**{name: resumption.summary[name] for name in names})
        self._say(
            f"{resumption.folder}: this run is finished ({outcome.ended}, {outcome.steps} steps);"
            f" nothing is left to do. For more: --resume {resumption.folder} --resume_with epochs=N"
        )
        return outcome

    def _show_settings(self, data: PreparedData) -> None:
        self.console.print("[bold]Settings[/]")
        self.console.print(settings_lines(self.resolved), soft_wrap=True)
        for warning in self.settings.warnings():
            self._say(f"warning: {warning}")
        self._say(data_line(data, self.settings.dataset_path or EXAMPLE_DATASET.name))
        self._say(targets_line(self.target_modules, self.model_config, self.settings.lora_r))

    def _load(self, plan: MemoryPlan, budget: int) -> tuple[PreparedModel, Engine]:
        started = time.perf_counter()
        model = self.prepare_model()
        seconds = time.perf_counter() - started
        self._say(model_line(model.decoder, model.adapter, self.settings, seconds))
        # The plan follows the fused engine's buffers and says nothing of autograd's.
        if self.settings.engine == "fused":
            self._say(memory_line(plan, budget))
            if plan.bytes > budget:
                self._say(f"warning: that may not fit. {memory_advice(self.settings)}")
        engine = self._build_engine(model.decoder)
        for name, choice in engine.choices.items():
            self._say(f"{name}: {choice}")
        return model, engine

    def _provenance(self, data: PreparedData, model: PreparedModel, engine: Engine) -> Provenance:
        """What this run is made of; of one that goes on, held against what it was made of.

        Raises:
            ResumeError: data or base model are not what they were.
        """
        now = Provenance(
            with_absolute_paths(self.resolved),
            self._asked,
            {
                **data_fingerprints(data, self.tokenizer),
                "base model": self._base_fingerprint,
            },
            surroundings(device_name(self.device), engine.choices),
            torch.get_num_threads(),
        )
        if self._resumption is None:
            return now
        for note in self._resumption.compare(now):
            self._say(note)
        threads = self._resumption.threads_to_use(now)
        torch.set_num_threads(threads)
        return self._resumption.going_on(now, threads)

    def _plan_memory(self, data: PreparedData) -> tuple[MemoryPlan, int]:
        """Settles the batch size and the recomputed layers; the plan, and the bytes there are."""
        budget = memory_budget(self.device)
        device: Any = self.device.type
        chosen, plan = settle_memory(
            self.settings, self.model_config, self.target_modules, data, budget, device
        )
        self.resolved = self.resolved.choose(**chosen)
        self.settings = self.resolved.settings
        return plan, budget

    def _build_engine(self, decoder: Decoder) -> Engine:
        settings = self.settings
        layers = settings.recompute_layers
        count = self.model_config.num_hidden_layers if layers == "all" else layers or 0
        if settings.engine == "reference":
            return ReferenceEngine(decoder, count, torch_compile=settings.torch_compile)
        return FusedEngine(
            decoder, settings.lora_dropout, count, torch_compile=settings.torch_compile
        )

    def _train(
        self, model: PreparedModel, engine: Engine, data: PreparedData, provenance: Provenance
    ) -> Outcome:
        settings, resumption = self.settings, self._resumption
        assert settings.output_dir
        state = start_state(engine, model.adapter, len(data.train_rows), settings)
        open_run = RunDirectory.take_up if resumption else RunDirectory
        run = open_run(settings.output_dir, self._say)
        view = open_view(self.console)
        sampler = Sampler(
            model.decoder,
            self.tokenizer,
            self.prompt_format,
            data.sample_prompts,
            settings.sample_tokens,
        )
        facts = facts_of(data)  # Now, while the files are what was read.
        if resumption:
            state.load(resumption.state["progress"], resumption.files)
            resumption.files.clear()  # Three or four times the adapter.
        with stop_signals(self._say) as stop:
            recorder = Recorder(
                run,
                view,
                open_trackers(settings.report_to, run.path, state.step + 1 if resumption else 0),
                sampler,
                model.adapter,
                self.tokenizer,
                self.prompt_format,
                # The adapter names its base, and means the same from any folder.
                provenance.effective.settings.model_name,
                stop,
                self._say,
            )
            if resumption:
                self._rewind(resumption, run, recorder, state)
            run.write_config(to_yaml(with_absolute_paths(self.resolved)))
            saver = Saver(
                run,
                settings,
                provenance,
                self._say,
                resumption.state["seconds"] if resumption else 0.0,
                resumption.checkpoint.name if resumption else None,
            )
            rows = len(data.train_rows)
            steps = settings.epochs * state.steps_per_epoch
            view.start(steps, settings.epochs * rows, state.step, state.rows_seen(rows, settings))
            try:
                outcome = train(
                    engine,
                    model.adapter,
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
                raise NonFiniteError(
                    f"{error}\nThe last good adapter is in {run.adapter}. Try half the"
                    " --learning_rate, --precision fp32, or look for odd rows in the data."
                ) from None
            finally:
                recorder.close()
            try:
                if recorder.adapter_waits or not run.adapter.exists():
                    recorder.save_adapter()
                run.lengths()  # Whatever waits is written now, or this is no success.
            except OSError as error:
                raise CheckpointError(
                    f"{run.path}: what came out cannot be written: {error.strerror or error}; make"
                    f" room, then go on from the last checkpoint with: {_command(run)}"
                ) from None
        compare_with_memory(model.adapter, run.adapter)
        if compiling := compile_seconds():
            self._say(f"torch_compile: compiling took {compiling:.1f} s of it")
        seconds = saver.training_seconds
        told = {"data": facts, "changed_on_resume": provenance.changes}
        self._conclude(outcome, run, model, data, sampler, recorder.base_samples, seconds, told)
        if saver.problem:
            raise CheckpointError(
                f"the last checkpoint could not be written: {saver.problem}; the adapter is whole:"
                f" {run.adapter}"
            )
        if outcome.interrupted:
            raise stop.interrupted(
                f"interrupted by {stop.signal} after step {outcome.steps} of {steps}; go on with:"
                f" {_command(run)}"
            )
        return outcome

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

    def _conclude(
        self,
        outcome: Outcome,
        run: RunDirectory,
        model: PreparedModel,
        data: PreparedData,
        sampler: Sampler,
        base_samples: list[Sample],
        seconds: float,
        provenance: dict[str, Any],
    ) -> None:
        """Answers the sample prompts with the best adapter, and writes and prints what came out."""
        tuned = [] if outcome.interrupted else sampler()
        unstopped = sum(not sample.stopped for sample in tuned)
        summary = {
            **asdict(outcome),
            "seconds": round(seconds, 3),
            **provenance,
            "trainable_parameters": model.adapter.num_parameters,
            "answers": [
                {"prompt": old.prompt, "base": old.answer, "tuned": new.answer}
                for old, new in zip(base_samples, tuned, strict=False)
            ],
            "answers_stopped_by_themselves": len(tuned) - unstopped,
        }
        evaluation: list[str] = []
        if not outcome.interrupted:
            coder = (self.tokenizer, self.prompt_format)
            evaluation = evaluate_at_end(
                self.settings, model.decoder, model.adapter, *coder, data, outcome, run
            )
        write_adapter_card(run.path, summary)
        run.write_summary(summary)  # Last: a run that has one is finished.
        if tuned and base_samples:
            self.console.print()
            self.console.print(answers_table(base_samples, tuned))
        if unstopped:
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
        for line in evaluation:
            self._say(line)

    def _say(self, text: str) -> None:
        # A log keeps its lines whole; a terminal breaks them between words.
        self.console.print(escape(text), soft_wrap=not self.console.is_terminal)


def _command(run: RunDirectory) -> str:
    """What goes on with a run."""
    return f"phitune train --resume {shlex.quote(str(run.path))}"
