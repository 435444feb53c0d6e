"""LoRATrainer: the whole job of `phitune train`, from settings to a finished run directory.

`train` is read downwards: data, memory, model, dry run, loop, results. The order matters: whatever
can be refused is refused before weights are read, and the run directory is not touched before the
dry run has fitted. The loop only yields events; here they are written, shown, saved and stopped.
"""

import datetime
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from phitune.apple.choice import (
    check_reference,
    engine_of,
    limit_memory,
    load_decoder_on,
)
from phitune.check.report import check_before_training
from phitune.config import MINIATURES, Resolved, Settings, as_flags, resolve, to_yaml
from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.mix import rows_per_epoch
from phitune.data.packing import Batch, first_rows, pack
from phitune.data.prepare import PreparedData, facts_of, prepare_data
from phitune.data.sources import check_is_here
from phitune.data.steps import OF_A_STEP, Steps, rows_after, total_steps
from phitune.data.tokenizer import TextTokenizer
from phitune.environment import NO_ROOM, find_folders
from phitune.errors import (
    CheckpointError,
    Interrupted,
    LostProcessError,
    ModelError,
    NonFiniteError,
    OutOfMemoryError,
    SavedAdapterError,
    SettingsError,
)
from phitune.export.card import write_adapter_card
from phitune.follower import begin_together
from phitune.follower import facts_of as facts_of_run
from phitune.inference.answers import sample_answers
from phitune.inference.bases import BaseLosses, base_losses
from phitune.inference.evaluate import evaluate_at_end
from phitune.inference.loaded import TOKENIZER_FILE, Answer, LoadedAdapter, LoadedModel
from phitune.model.architecture import notes_on_config, read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.device import (
    DTYPES,
    choose_device,
    choose_precision,
    compile_seconds,
    deterministic,
    device_name,
    first_line,
    give_back_memory,
    guard_memory,
    hold_reserve,
    is_out_of_memory,
    release_freed_memory,
    torch_device,
)
from phitune.model.engine import Engine
from phitune.model.files import EXAMPLE_DATASET, SHIPPED_MODELS, fetch_weights, find_model
from phitune.model.lora import Adapter, attach, compare_with_memory, save_adapter
from phitune.model.quantization import (
    CALIBRATION_TOKENS,
    QUANTIZATION_FILE,
    Quantization,
    choose_for_folder,
    quantization_from_json,
)
from phitune.model.scheme import read_scheme
from phitune.model.start_adapter import find_start_adapter, sha256_there, spec_of
from phitune.model.weights import weights_fingerprint
from phitune.plan.machine import (
    Memory,
    ProcessMemoryLimit,
    check_base_placement,
    free_memory,
    memory_budget,
)
from phitune.plan.memory import GIB, Base, MemoryPlan, layer_bytes
from phitune.plan.plan import check_against_model, settle_memory, what_would_fit
from phitune.progress import (
    Position,
    RunConsole,
    View,
    answers_table,
    data_line,
    data_progress,
    guessing_lines,
    memory_line,
    model_line,
    open_view,
    settings_lines,
    targets_line,
    warning_lines,
)
from phitune.text import command_line, plural
from phitune.training.checkpoint import checkpoints_of
from phitune.training.events import (
    Ending,
    Evaluated,
    NumbersRefused,
    Paused,
    RanOutOfMemory,
)
from phitune.training.group import first_process
from phitune.training.interrupt import Stop, StopRequested, stop_signals
from phitune.training.loop import ending_of, fit, start_state
from phitune.training.out_of_memory import dry_run, why_not_written
from phitune.training.processes import Processes
from phitune.training.resume import (
    START_ADAPTER,
    Provenance,
    Resumption,
    data_fingerprints,
    run_to_resume,
    surroundings,
    with_absolute_paths,
)
from phitune.training.rundir import (
    ADAPTER,
    CHECKPOINTS,
    RunDirectory,
    check_can_go_on,
    check_output_dir,
    default_output_dir,
    run_lock,
)
from phitune.training.saver import Moment, Saver, moment_of
from phitune.training.state import TrainingState, copy_of, restore
from phitune.training.status import Status, watched
from phitune.training.threads import (
    are_chosen_by_the_user,
    measure_threads,
    threads_are_torchruns,
)
from phitune.training.trackers import Trackers, check_trackers, tracker_names
from phitune.untrusted import write_object

# Freed memory is kept for speed where this share of the plan fits: what is kept is fragmented.
_PLENTY = 1.25
# Answers shown after a validation that changed them; all of them are in samples.jsonl.
_SAMPLES_SHOWN = 2
# Characters of a sample prompt that stands in a command to copy.
_SHORT = 80


@dataclass(frozen=True)
class PreparedModel:
    """The frozen decoder and the adapter on it."""

    decoder: Decoder
    adapter: Adapter


@dataclass(frozen=True)
class SampleAnswer:
    """What was answered to a sample prompt before training and after it."""

    prompt: str  # that was asked
    before: str  # by the base model, or by the adapter that the run started from
    tuned: str  # by the adapter


@dataclass(kw_only=True)
class Outcome(Ending):
    """What came of a run: how it ended, where it is, and its last answers."""

    run_directory: Path  # absolute; `phitune.load` takes it
    answers: tuple[SampleAnswer, ...]  # to the sample prompts; none where `sample_tokens` is 0


def _check_threads(threads: int | str) -> None:
    """
    Raises:
        SettingsError: more threads than processors, which would only wait for one another.
    """
    processors = os.cpu_count() or 1
    if isinstance(threads, int) and threads > processors:
        raise SettingsError(
            f"threads {threads}: this machine has {plural(processors, 'processor')}; use"
            f" --threads {processors}, or auto"
        )


def _sample_answers(
    prompts: list[str], before: list[Answer], tuned: list[Answer]
) -> tuple[SampleAnswer, ...]:
    """The answers to each prompt; none where an interrupted run has none at its end."""
    return tuple(
        SampleAnswer(prompt, old.text, new.text)
        for prompt, old, new in zip(prompts, before, tuned, strict=False)
    )


def _changed(
    prompts: list[str], answers: list[Answer], last_shown: Mapping[str, Answer]
) -> dict[str, Answer]:
    """Of the first prompts, the answers that are not those that were shown last."""
    first = dict(list(zip(prompts, answers, strict=False))[:_SAMPLES_SHOWN])
    return {
        prompt: answer
        for prompt, answer in first.items()
        if prompt not in last_shown or last_shown[prompt].text != answer.text
    }


def _keeps_freed(plan: MemoryPlan, budget: Memory) -> bool:
    return _PLENTY * plan.bytes <= budget.bytes


def _remedy(error: OSError) -> str:
    """What to do where something cannot be written."""
    return "free some disk space" if error.errno in NO_ROOM else "make it writable"


class LoRATrainer:
    """Fine-tunes one model on one data set.

        trainer = LoRATrainer(output_dir="output/my_model", dataset_path="data/train.jsonl")
        outcome = trainer.train()

    Args:
        output_dir, dataset_path, model_name: as the flags of those names.
        config: any other settings by name, the path of a YAML file with them, or settings that are
            resolved already, as the command line has them.
        verbose: also print the settings at their defaults, and what was chosen by measurement.
        to_stderr: print on standard error, where standard output has another use.

    Raises:
        PhituneError: settings, data or model files that cannot be used.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        dataset_path: str | Path | None = None,
        model_name: str | None = None,
        config: Mapping[str, Any] | str | Path | Resolved | None = None,
        *,
        verbose: bool = False,
        to_stderr: bool = False,
    ) -> None:
        find_folders()
        self.verbose = verbose
        self.console: Console = RunConsole(highlight=False, stderr=to_stderr)
        given = {
            "output_dir": output_dir,
            "dataset_path": dataset_path,
            "model_name": model_name,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        if isinstance(config, Resolved):
            resolved = config
        elif isinstance(config, Mapping):
            resolved = resolve({**config, **arguments}, None, origin="argument")
        else:
            config_path = None if config is None else Path(config)
            resolved = resolve(arguments, config_path, origin="argument")

        self._resumption = run_to_resume(resolved)
        self._asked = with_absolute_paths(resolved)
        if self._resumption:
            resolved, self._asked = self._resumption.effective, self._resumption.asked
        self.resolved = resolved.choose(**self._chosen(resolved.settings))
        if not self._resumption:  # A resumed run may have come to a machine with fewer.
            _check_threads(self.resolved.settings.threads)
        self.settings = self.resolved.settings
        self._check_output_dir()
        check_trackers(tracker_names(self.settings.report_to))
        # Before the model, which may have to be fetched.
        check_is_here(self._dataset_path)
        if self.settings.validation_path:
            check_is_here(self.settings.validation_path, "validation")
        for path, _ in self.settings.mixed:
            check_is_here(path)
        self.model_folder = find_model(self.settings.model_name)
        self.model_config = read_model_config(self.model_folder)
        self._scheme = read_scheme(self.model_folder)
        self.tokenizer = TextTokenizer(self.model_folder)
        self.coder = Coder.of(self.tokenizer, self.settings.prompt_format)
        self.prompt_format = self.coder.prompt_format
        self.target_modules = resolve_targets(
            self.model_config, self.settings.target_modules, self.settings.layers
        )
        check_against_model(
            self.settings, self.model_config, self.tokenizer.size, self.model_folder
        )
        # A resumed run has all of it in its checkpoint.
        self._start = (
            None
            if self._resumption
            else find_start_adapter(self.settings, self.model_config, self.target_modules)
        )
        self._start_sha256 = self._start.sha256 if self._start else None
        if self._resumption:
            self._start_sha256 = self._resumption.saved.fingerprints.get(START_ADAPTER)
        self._model: PreparedModel | None = None

    @property
    def device(self) -> torch.device:
        """Where torch's tensors are; beside MLX the CPU."""
        return torch_device(self.settings.device)

    def format_instruction(self, prompt: str, response: str) -> str:
        """A row as text, as the model sees it; the end token that follows is not shown."""
        turns = (Turn("user", prompt), Turn("assistant", response))
        segments = self.prompt_format.segments(turns)[:-1]
        return "".join(segment.text for segment in segments)

    def prepare_data(self) -> PreparedData:
        """Reads, checks, splits and tokenizes the rows.

        Raises:
            DataError: every problem of the files at once.
        """
        with data_progress(self.console) as progress:
            data = prepare_data(self.settings, self._dataset_path, self.coder, progress)
        formats = [note for note in data.notes if note.rpartition(": ")[2].startswith("read as ")]
        for note in data.notes:
            # One format for all is in the first line of the checks, too.
            if self.verbose or [note] != formats:
                self._say(f"data: {note}")
        for warning in data.warnings:
            self._say(f"warning: {warning}")
        return data

    def prepare_model(self, rows: Batch | None = None) -> PreparedModel:
        """Loads the base, once, and attaches the adapter to it.

        Args:
            rows: of the data, that pass through while a base is quantised.
        """
        if self._model is None:
            settings = self.settings
            torch.manual_seed(settings.seed)
            fetch_weights(settings.model_name, self.model_folder)
            placement = settings.base_placement
            if placement == "auto":
                raise SettingsError("base_placement auto: train() chooses it, by the data; name it")
            decoder = load_decoder_on(
                self.model_folder,
                self.model_config,
                DTYPES[settings.precision],
                settings.device,
                self._quantization() or placement,
                None if self._resumption else rows,
            )
            self._base_fingerprint = weights_fingerprint(decoder)
            spec = spec_of(settings, self.target_modules)
            if self._start:
                adapter = self._start.put_on(decoder, spec, settings.seed)
            else:
                adapter = attach(decoder, spec, settings.seed)
            self._model = PreparedModel(decoder, adapter)
        return self._model

    def _quantization(self) -> Quantization | None:
        """How the base is held: as the settings or its files say, or as a resumed run found it."""
        if self._resumption and (found := self._resumption.saved.quantization):
            return quantization_from_json(found)
        settings, scheme = self.settings, self._scheme
        asked, products = settings.quantization, settings.products
        if asked == "auto":
            raise SettingsError("quantization auto: train() chooses it, by the data; name it here")
        if settings.engine == "reference":
            if products == "low":
                raise SettingsError("products low: the reference engine has exact ones alone")
            products = "exact"
        elif settings.precision == "bf16" and settings.device == "cpu":
            if products == "low":
                raise SettingsError("products low: a CPU trains with them in fp32 alone, not bf16")
            products = "exact"
        chosen, why = choose_for_folder(scheme, asked, products, settings.device)
        if chosen is None and scheme:
            self._say(f"quantization: none; {why}")
        elif chosen and (self.verbose or scheme):
            self._say(
                f"quantization: {chosen.kind}, products {'low' if chosen.low else 'exact'} ({why})"
            )
        return chosen

    def train(self) -> Outcome:
        """The whole job: from the data file to the run directory.

        Raises:
            PhituneError: what cannot be used, or went wrong; its message says what to do.
            KeyboardInterrupt: a signal stopped it; a checkpoint of where it was is written.
        """
        resumption = self._resumption
        with ExitStack() as held:
            processes = first_process(self.settings.processes, self.settings.device)
            held.enter_context(processes.taking_part())
            if resumption and resumption.summary:
                return self._already_finished(resumption)

            # One process per run directory. That of a new run is made only when the model is there.
            if resumption:
                held.enter_context(run_lock(resumption.folder))
                resumption.check_unchanged()
            self._check_output_dir()

            held.enter_context(deterministic(self.device, wanted=self.settings.deterministic))

            # Threads: those that are given; others are measured behind the dry run.
            held.callback(torch.set_num_threads, torch.get_num_threads())
            if isinstance(self.settings.threads, int) and not resumption:
                torch.set_num_threads(self.settings.threads)

            # Data: read, checked, tokenized.
            data = self.prepare_data()
            check_before_training(self.settings, self._dataset_path, self.coder, data, self._say)
            steps = Steps(rows_per_epoch(data.train_rows), self.settings)

            # Memory: what fits, by arithmetic.
            budget = memory_budget(self.settings.device).shared(processes.on_this_device)
            limit_memory(self.settings.device, budget.bytes)
            process_limit = held.enter_context(ProcessMemoryLimit(self.settings.device))
            plan = self._plan_memory(data, budget, processes)
            self._show_settings(data, steps)
            try:
                # The model, and the engine that computes on it.
                processes.start_others()
                rows = pack(first_rows(data.train_rows, CALIBRATION_TOKENS)).to(self.device)
                model, engine = self._load(plan, budget, rows)
                provenance = self._provenance(data, engine)
                if not resumption:
                    held.enter_context(run_lock(self._output_dir))
                    self._check_output_dir()

                # Dry run: the largest micro-batch, a validation and a checkpoint must fit.
                state = start_state(
                    engine, model.adapter, rows_per_epoch(data.train_rows), self.settings
                )
                provenance = self._dry_run(
                    provenance, engine, state, data, processes, process_limit
                )
                provenance = self._choose_threads(provenance, engine, state, data, processes)
                processes.tell("job", self._job(provenance, plan, budget))
                release_freed_memory()  # Threads and small things come next.

                # Training: each event is shown, written, and saved when a checkpoint is due.
                facts = facts_of(data)  # Now, while the files are what was read.
                with stop_signals(self._say, processes.ask_to_stop) as stop:
                    run = self._open_run(state)
                    facts_of_all = facts_of_run(
                        data, self.tokenizer, self._base_fingerprint, engine
                    )
                    begin_together(processes, facts_of_all, engine, state)
                    prompts = self._sample_prompts(data)
                    first_samples, is_adapter_saved = self._first_samples(run, prompts), True
                    last_shown: dict[str, Answer] = {}
                    refused: NumbersRefused | None = None
                    view, trackers = self._open_views(run, state, data)
                    status = held.enter_context(
                        watched(run.path, self._status(state, data, plan, budget))
                    )
                    saver, is_through = self._saver(run), False
                    try:
                        for event in fit(engine, state, data, self.settings, processes):
                            if isinstance(event, Paused):  # Asked here, or in another process.
                                stop.signal = stop.signal or event.signal
                                break
                            status.show(event)
                            with stop.showing():
                                view.show(event)
                                self._warn(warning_lines(event, data))
                            samples: list[Answer] = []
                            if isinstance(event, RanOutOfMemory):
                                process_limit.renew()
                                provenance = self._split_further(event, provenance, run)
                            elif isinstance(event, NumbersRefused) and event.gives_up:
                                refused = event
                                if not event.numbers.is_validation:
                                    # Before it is written down: a resumed run meets it again.
                                    self._save(saver, state, "end", provenance)
                            elif isinstance(event, Evaluated):
                                with stop.showing():
                                    self._warn(self._guessing(event))
                                if event.is_best:
                                    is_adapter_saved = self._try_to_save_adapter(run)
                                samples = self._samples(data, stop)
                                if stop.requested:
                                    # This step will be validated again: its adapter is no best.
                                    is_adapter_saved &= not event.is_best
                                    break
                                first_samples = first_samples if event.epoch else samples
                            run.write(event, data)
                            failed = trackers.log(event)
                            if isinstance(event, Evaluated):
                                run.write_samples(event.epoch, state.step, prompts, samples)
                            with stop.showing():
                                self._warn(failed)
                                changed = _changed(prompts, samples, last_shown)
                                view.show_samples(list(changed), list(changed.values()))
                            last_shown |= changed
                            if moment := moment_of(event):
                                self._save(saver, state, moment, provenance)
                            # What is written of a step counts only once the state counts it.
                            is_written = isinstance(event, Evaluated)
                            # Several processes pause together, and none has computed in vain.
                            is_alone = processes.size == 1
                            if stop.requested and is_alone and not (is_written or refused):
                                break
                        if not refused:
                            self._save(saver, state, "end", provenance)
                        is_through = not (stop.requested or refused)
                    except OutOfMemoryError:
                        self._save(saver, state, "end", provenance)
                        raise
                    except LostProcessError as error:
                        self._save(saver, state, "end", provenance)
                        raise LostProcessError(
                            f"{error}; resume with: {self._resume_command}"
                        ) from None
                    finally:
                        with stop.showing():
                            view.close()
                        unwritten = trackers.close(finished=is_through)
                        with stop.showing():
                            self._warn(unwritten)
                    if refused:
                        raise self._non_finite(refused, state, run)
                    state.restore_best()
                    ending = ending_of(state, self.settings)
                    give_back_memory(engine.device)  # What comes now needs other pieces of it.
                    self._complete_files(run, is_adapter_saved=is_adapter_saved)
                compare_with_memory(model.adapter, run.adapter)

                # Results: answers and evaluation of the best adapter, its card, the summary.
                status.enter("evaluation")
                before = "start adapter" if self._start_sha256 else "base"
                tuned = [] if ending.interrupted else self._samples(data)
                answers = _sample_answers(prompts, first_samples, tuned)
                evaluation = self._evaluate(ending, run, data)
                bases = self._base_losses(ending, engine, data)
                summary = {
                    **asdict(ending),
                    "seconds": round(saver.training_seconds, 3),
                    "data": facts,
                    "changes": provenance.changes,
                    "trainable_parameters": model.adapter.num_parameters,
                    **self._started_from(),
                    "answers": [
                        {"prompt": each.prompt, before: each.before, "tuned": each.tuned}
                        for each in answers
                    ],
                    "answers_stopped_by_themselves": sum(answer.stopped for answer in tuned),
                    **({"losses_by_base": bases.as_json()} if bases else {}),
                }
                write_adapter_card(run.path, summary)
                run.write_summary(summary)  # Last: a run that has one is finished.
                if tuned and first_samples:
                    self.console.print()
                    self.console.print(answers_table(prompts, first_samples, tuned, before))
                if bases:
                    evaluation += bases.lines(self.settings.quantization)
                self._show_results(ending, run, tuned, evaluation, saver.training_seconds)
                if not ending.interrupted:
                    self._show_what_next(steps, run, prompts, len(data.validation_rows))
                if saver.problem:
                    raise CheckpointError(
                        f"the last checkpoint could not be written: {saver.problem}; the adapter"
                        f" is complete: {run.adapter}"
                    )
                if ending.interrupted:
                    raise self._interrupted(stop, state)
                status.enter("finished", ending.ended)
                return Outcome(**vars(ending), run_directory=run.path.absolute(), answers=answers)
            except (RuntimeError, MemoryError, OutOfMemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # Only here, behind the clause, nothing holds the tensors of what failed any more.
            raise self._out_of_memory(reason, data, budget.bytes, processes)

    # ---------------------------------------------------------------------------------------------
    # Before training.

    @property
    def _output_dir(self) -> Path:
        assert self.settings.output_dir
        return self.settings.output_dir

    @property
    def _dataset_path(self) -> Path:
        return self.settings.dataset_path or EXAMPLE_DATASET

    @property
    def _step_0(self) -> str:
        """What answers and is validated before the first step."""
        return "start adapter (step 0)" if self._start_sha256 else "base model"

    @property
    def _steps_before(self) -> int:
        """Optimizer steps that a resumed run has done already."""
        return self._resumption.state["progress"]["step"] if self._resumption else 0

    def _total_steps(self, state: TrainingState) -> int:
        return total_steps(self.settings, state.steps_per_epoch)

    @property
    def _resume_command(self) -> str:
        return command_line("train", "--resume", self._output_dir)

    @staticmethod
    def _chosen(settings: Settings) -> dict[str, Any]:
        """What the settings leave open and does not depend on the data, by name."""
        device = choose_device(settings.device)
        if settings.engine == "reference":
            check_reference(device)
        chosen: dict[str, Any] = {}
        if settings.output_dir is None:
            chosen["output_dir"] = default_output_dir(
                settings.model_name, settings.dataset_path or EXAMPLE_DATASET
            )
        if settings.device == "auto":
            chosen["device"] = device
        if settings.precision == "auto":
            chosen["precision"] = choose_precision(settings.precision, device)
        check_base_placement(settings.base_placement, device.partition(":")[0])
        return chosen

    def _check_output_dir(self) -> None:
        if self._resumption:
            check_can_go_on(self._output_dir)
        else:
            resuming = self.settings.resume is not None
            check_output_dir(self._output_dir, overwrite=self.settings.overwrite, resuming=resuming)

    def _already_finished(self, resumption: Resumption) -> Outcome:
        assert resumption.summary
        names = [field.name for field in fields(Ending)]
        ending = Ending(**{name: resumption.summary[name] for name in names})
        self._say(
            f"{resumption.folder}: this run is finished ({ending.ended},"
            f" {plural(ending.steps, 'step')}), there is nothing left to do. To train it longer:"
            f" {resumption.command_to_go_on()}"
        )
        answers = tuple(
            SampleAnswer(each["prompt"], each.get("start adapter", each.get("base")), each["tuned"])
            for each in resumption.summary.get("answers", [])
        )
        return Outcome(**vars(ending), run_directory=resumption.folder.absolute(), answers=answers)

    def _plan_memory(self, data: PreparedData, budget: Memory, processes: Processes) -> MemoryPlan:
        """Settles the batch size and the recomputed layers; returns the plan that follows."""
        settings = self.settings.model_copy(update={"processes": processes.size})
        chosen, plan, why = settle_memory(
            settings, self.model_config, self.target_modules, data, budget.bytes, self._scheme
        )
        self._take(self.resolved.choose(**chosen))
        for name, reason in why.items():
            self._say(f"{name} auto: {reason}")
        if self.settings.base_placement == "ram":
            self._check_ram(processes, was_asked=settings.base_placement == "ram")
        if settings.batch_size not in ("auto", self.settings.batch_size):
            self._say(
                f"memory: batch_size {settings.batch_size} does not fit"
                f" {budget.bytes / GIB:.2f} GiB ({budget.source}); training uses"
                f" {self.settings.batch_size} x {self.settings.gradient_accumulation_steps} rows,"
                " the same effective batch"
            )
        return plan

    def _check_ram(self, processes: Processes, *, was_asked: bool) -> None:
        """Whether the RAM beside a GPU can hold the layers; else they stay in the files.

        Raises:
            SettingsError: it cannot, and it was asked for.
        """
        base: Base = "fp32" if self.settings.precision == "fp32" else "bf16"
        needed = processes.on_this_machine * layer_bytes(self.model_config, base)
        there = free_memory()
        if needed <= there.budget("cpu"):
            return
        takes = (
            f"base_placement ram: the layers take {needed / GIB:.1f} GiB of RAM, and a run may take"
            f" {there.budget('cpu') / GIB:.1f} GiB ({there.source})"
        )
        if was_asked:
            raise SettingsError(f"{takes}; use --base_placement disk")
        self._say(f"{takes}; they stay in the model's files")
        self._take(self.resolved.choose(base_placement="disk"))

    def _take(self, resolved: Resolved) -> None:
        self.resolved, self.settings = resolved, resolved.settings

    def _show_settings(self, data: PreparedData, steps: Steps) -> None:
        lines = settings_lines(self.resolved, verbose=self.verbose)
        self.console.print(lines, soft_wrap=not self.console.is_terminal)
        # What is advised for few rows may be outside of the guide's ranges.
        self._warn(self.settings.warnings(but=() if steps.guide_makes_enough else OF_A_STEP))
        if self.settings.model_name in SHIPPED_MODELS and self.settings.dataset_path:
            self._warn([f"the shipped models {MINIATURES}"])
        self._say(f"{'warning: ' if steps.verdict == 'too few' else 'steps: '}{steps.line}")
        # Else an epoch has the rows that the checks have counted.
        if self.verbose or data.mixed or self.settings.on_too_long == "split":
            self._say(data_line(data, self.settings.dataset_path or EXAMPLE_DATASET.name))
        self._say(targets_line(self.target_modules, self.model_config, self.settings.lora_r))
        if self._start:
            self._say(
                f"start adapter: {self._start.folder} (sha256 {self._start.sha256[:16]});"
                " the answers and the validation loss at step 0 are its own, not the base model's"
            )
            for warning in self._other_format(self._start.folder):
                self._say(f"warning: {warning}")

    def _other_format(self, folder: Path) -> list[str]:
        """A warning where the start adapter carries another prompt format than the run's."""
        if not (folder / TOKENIZER_FILE).is_file():
            return []
        theirs = Coder.as_saved(TextTokenizer(folder))
        if theirs.prompt_format.chat_template == self.coder.prompt_format.chat_template:
            return []
        return [
            f"{folder}: was trained in the {theirs.format_name} format"
            f" ({theirs.text((Turn('user', '...'),))!r}), and this run asks in"
            f" {self.coder.text((Turn('user', '...'),))!r}; see --prompt_format"
        ]

    def _started_from(self) -> dict[str, Any]:
        """The entry of a run in its summary that started from an adapter."""
        path = self.settings.start_adapter
        if path is None:
            return {}
        # For people: the name of the run, where it is a run's.
        path = path.absolute()
        name = path.parent.name if path.name == ADAPTER else path.name
        return {"start_adapter": {"name": name, "path": str(path), "sha256": self._start_sha256}}

    def _load(self, plan: MemoryPlan, budget: Memory, rows: Batch) -> tuple[PreparedModel, Engine]:
        started = time.perf_counter()
        model = self.prepare_model(rows)
        seconds = time.perf_counter() - started
        self._say(model_line(model.decoder, model.adapter, self.settings, seconds))
        for note in notes_on_config(self.model_folder):
            self._say(f"warning: {note}")
        if found := model.decoder.quantization:
            in_groups = f"{found.kind}, multiplied by MLX as it is held, in groups of 64"
            self._say(f"quantization: {in_groups if model.decoder.is_mlx else found.in_words}")
        if residence := model.decoder.residence:
            self._say(f"base_placement {self.settings.base_placement}: {residence.in_words}")
        # The plan follows the fused engine's buffers and knows nothing of autograd's.
        if self.settings.engine == "fused":
            self._say(memory_line(plan, budget))
        engine = engine_of(model.decoder, self.settings, keep_freed=_keeps_freed(plan, budget))
        if self.verbose:
            for name, choice in engine.choices.items():
                self._say(f"{name}: {choice}")
        return model, engine

    def _provenance(self, data: PreparedData, engine: Engine) -> Provenance:
        """What this run is made of; compared with the checkpoint's where it is resumed.

        Raises:
            ResumeError: the data or the base model changed.
        """
        now = Provenance(
            with_absolute_paths(self.resolved),
            self._asked,
            {
                **data_fingerprints(data, self.tokenizer),
                "base model": self._base_fingerprint,
                **self._start_fingerprint(),
            },
            {
                **surroundings(device_name(self.settings.device), engine.choices),
                **({"base model's files": self._scheme.name} if self._scheme else {}),
            },
            torch.get_num_threads(),
            found.as_json() if (found := self.prepare_model().decoder.quantization) else None,
        )
        if self._resumption is None:
            return now
        for note in self._resumption.compare(now):
            self._say(note)
        threads = self._resumption.threads_to_use(now)
        torch.set_num_threads(threads)
        return self._resumption.resumed(now, threads)

    def _dry_run(
        self,
        provenance: Provenance,
        engine: Engine,
        state: TrainingState,
        data: PreparedData,
        processes: Processes,
        process_limit: ProcessMemoryLimit,
    ) -> Provenance:
        """Tries what a run needs the most memory for, and splits a step further where it must."""
        hold_reserve()
        for tried in dry_run(engine, state, data, self.settings, processes):
            if isinstance(tried, RanOutOfMemory):
                process_limit.renew()
                tried = replace(tried, step=self._steps_before)
                provenance = self._split_further(tried, provenance)
                self._warn(warning_lines(tried, data))
            else:
                self._say(str(tried))
        return provenance

    def _choose_threads(
        self,
        provenance: Provenance,
        engine: Engine,
        state: TrainingState,
        data: PreparedData,
        processes: Processes,
    ) -> Provenance:
        """The threads of a new run that trains on a CPU: by measurement, unless they are given.

        Several processes share the processors.
        """
        if self._resumption or self.settings.threads != "auto" or engine.device_name != "cpu":
            return provenance
        if processes.on_this_device > 1 and threads_are_torchruns():
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes.on_this_device))
        elif not are_chosen_by_the_user():
            seconds = measure_threads(engine, state, data, self.settings)
            if self.verbose and len(seconds) > 1:
                figures = [f"{n}: {1000 * each:.1f} ms" for n, each in seconds.items()]
                self._say(
                    f"threads: {torch.get_num_threads()}, measured on a micro-batch"
                    f" ({', '.join(figures)})"
                )
        threads = torch.get_num_threads()
        self._take(self.resolved.choose(threads=threads))
        effective = with_absolute_paths(self.resolved)
        return replace(provenance, effective=effective, threads=threads)

    def _job(self, provenance: Provenance, plan: MemoryPlan, budget: Memory) -> dict[str, Any]:
        """What another process has to know to load the same, see follower.py."""
        return {
            "settings": with_absolute_paths(self.resolved).settings.model_dump(mode="json"),
            "modules": self.target_modules,
            "quantization": provenance.quantization,
            "keep_freed": _keeps_freed(plan, budget),
        }

    def _start_fingerprint(self) -> dict[str, str]:
        """That of the adapter which this run started from, where there is one."""
        path = self.settings.start_adapter
        if path is None or self._start_sha256 is None:
            return {}
        found: str | None = self._start_sha256
        if self._resumption and not (found := sha256_there(path)):
            self._say(f"start_adapter {path}: is gone; the checkpoint holds what became of it")
        return {START_ADAPTER: found or self._start_sha256}

    def _config_text(self) -> str:
        """The run's config.yaml."""
        remarks = {}
        if self._start_sha256:
            remarks["start_adapter"] = f"sha256 {self._start_sha256}"
        return to_yaml(with_absolute_paths(self.resolved), remarks)

    def _open_run(self, state: TrainingState) -> RunDirectory:
        """The run directory, emptied; of a resumed run, both it and the state as they were when the
        checkpoint was written.
        """
        run = RunDirectory(self._output_dir, self._say)
        if resumption := self._resumption:
            run.repair()
            state.load(resumption.state["progress"], resumption.files)
            resumption.files.clear()  # Three or four times the adapter.
            self._warn([*resumption.notes, *run.rewind(resumption.state["logs"])])
            resumption.set_damaged_aside()
            self._put_back_adapter(state.best, run)
            self._say(f"resuming from {resumption.checkpoint}: step {state.step} is done")
            if note := resumption.rate_note(state.steps_per_epoch):
                self._say(note)
        else:
            run.empty()
        run.write_config(self._config_text())
        return run

    def _put_back_adapter(self, best: dict[str, Tensor], run: RunDirectory) -> None:
        """Makes the adapter on disk the best one of the checkpoint again, or removes it."""
        if not best:
            run.remove_adapter()
            return
        adapter = self.prepare_model().adapter
        now = copy_of(adapter)
        restore(adapter, best)
        try:
            compare_with_memory(adapter, run.adapter)
        except SavedAdapterError:
            self._save_adapter(run)
        finally:
            restore(adapter, now)

    def _open_views(
        self, run: RunDirectory, state: TrainingState, data: PreparedData
    ) -> tuple[View, Trackers]:
        """What shows the run: the terminal, and trackers such as TensorBoard."""
        first_step = state.step + 1 if self._resumption else 0
        names = tracker_names(self.settings.report_to)
        trackers = Trackers(names, run.path, self.settings, first_step)
        for place in trackers.places:
            self._say(f"report_to {place}")
        rows, steps = rows_per_epoch(data.train_rows), self._total_steps(state)
        view = open_view(self.console, self._step_0)
        view.start(
            total=Position(steps, rows_after(steps, rows, self.settings)),
            done=Position(state.step, state.rows_seen(rows, self.settings)),
        )
        return view, trackers

    def _status(
        self, state: TrainingState, data: PreparedData, plan: MemoryPlan, budget: Memory
    ) -> Status:
        """Where the run is, for status.json."""
        rows, steps = rows_per_epoch(data.train_rows), self._total_steps(state)
        return Status(
            phase="training",
            step=state.step,
            total_steps=steps,
            epoch=max(state.epochs_done, 0),
            epochs=-(-steps // state.steps_per_epoch),
            rows=state.rows_seen(rows, self.settings),
            total_rows=rows_after(steps, rows, self.settings),
            seconds_left=None,
            planned_bytes=plan.bytes,
            limit_bytes=budget.bytes,
        )

    def _saver(self, run: RunDirectory) -> Saver:
        if resumption := self._resumption:
            validated_step = resumption.state["progress"]["validated_step"]
            saved = resumption.checkpoint.name, validated_step
            return Saver(run, self.settings, resumption.state["seconds"], saved)
        return Saver(run, self.settings)

    # ---------------------------------------------------------------------------------------------
    # While training.

    def _split_further(
        self, event: RanOutOfMemory, provenance: Provenance, run: RunDirectory | None = None
    ) -> Provenance:
        """After memory ran out: the settings that the run has from now on, also in config.yaml."""
        if event.now == event.then:
            return provenance
        rows = self.settings.rows_per_step
        then, now = event.then.settings(rows), event.now.settings(rows)
        self._take(self.resolved.choose(**dict(now.items() - then.items())))
        if run:
            try:
                run.write_config(self._config_text())
            except OSError as error:
                self._warn([f"config.yaml cannot be written: {error.strerror or error}"])
        return provenance.after(event, self.resolved)

    def _save(
        self, saver: Saver, state: TrainingState, moment: Moment, provenance: Provenance
    ) -> None:
        if saver.is_due(state, moment) and (warning := saver.save(state, provenance)):
            self._say(warning)

    def _save_adapter(self, run: RunDirectory) -> None:
        """Replaces the run's adapter by the one in training, ready for PEFT and for servers."""
        adapter = self.prepare_model().adapter

        def write(folder: Path) -> None:
            # The adapter names its base so that it means the same from any folder.
            base = with_absolute_paths(self.resolved).settings.model_name
            save_adapter(adapter, folder, base)
            self.coder.save(folder)
            if found := self.prepare_model().decoder.quantization:
                write_object(folder / QUANTIZATION_FILE, found.as_json())

        run.replace_adapter(write)

    def _try_to_save_adapter(self, run: RunDirectory) -> bool:
        """Whether it could be written; if not, it is tried again at the end."""
        try:
            self._save_adapter(run)
        except (OSError, MemoryError, RuntimeError) as error:
            self._warn(
                [
                    f"{run.adapter}: cannot be written: {why_not_written(error)}; training"
                    " continues, and it is tried again"
                ]
            )
            return False
        return True

    def _guessing(self, event: Evaluated) -> list[str]:
        """What is to be said of a validation loss before the first step that chance would beat."""
        if event.epoch or not event.evaluation:
            return []
        loss = event.evaluation.validation_loss
        return guessing_lines(loss, self.model_config.vocab_size, self.settings.model_name)

    def _sample_prompts(self, data: PreparedData) -> list[str]:
        """The prompts that are answered after each validation; none where `sample_tokens` is 0."""
        return [prompt.text for prompt in data.sample_prompts if self.settings.sample_tokens]

    def _samples(self, data: PreparedData, stop: Stop | None = None) -> list[Answer]:
        """Answers to the sample prompts; none where there is no memory for them, or on a stop."""
        limit, decoder = self.settings.sample_tokens, self.prepare_model().decoder
        if not limit:
            return []
        prompts = [prompt.ids for prompt in data.sample_prompts]
        check = stop.check if stop else lambda: None
        try:
            return guard_memory(
                lambda: sample_answers(decoder, self.coder, prompts, limit, check), self.device
            )
        except StopRequested:
            return []
        except OutOfMemoryError:
            self._warn(["there is no memory for the answers to the sample prompts; skipped"])
            return []

    def _first_samples(self, run: RunDirectory, prompts: list[str]) -> list[Answer]:
        """The answers before the first step that an earlier process of this run wrote."""
        lines = run.samples(epoch=0)
        if [line["prompt"] for line in lines] != prompts:
            return []
        return [Answer(line["answer"], (), line["stopped"]) for line in lines]

    # ---------------------------------------------------------------------------------------------
    # After training.

    def _complete_files(self, run: RunDirectory, *, is_adapter_saved: bool) -> None:
        """Writes what waited for the disk.

        Raises:
            CheckpointError: the disk is still full or gone, so this is no success.
        """
        try:
            if not is_adapter_saved or not run.adapter.exists():
                self._save_adapter(run)
            run.lengths()
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or run.path}: the results cannot be written:"
                f" {error.strerror or error}; {_remedy(error)}, then resume from the last"
                f" checkpoint with: {self._resume_command}"
            ) from None

    def _evaluate(self, ending: Ending, run: RunDirectory, data: PreparedData) -> list[str]:
        """The evaluation of the best adapter, in lines; none of an interrupted run."""
        if ending.interrupted:
            return []
        model = self.prepare_model()
        trained = LoadedModel(
            self.settings.model_name,
            self.model_folder,
            model.decoder,
            self.coder,
            [LoadedAdapter(str(run.path), run.adapter, model.adapter, self.coder)],
        )
        return evaluate_at_end(self.settings, trained, data, ending, run)

    def _base_losses(self, ending: Ending, engine: Engine, data: PreparedData) -> BaseLosses | None:
        """What the adapter loses on other bases than the quantised one that it was trained on."""
        model = self.prepare_model()
        # Files that are quantised already are no original.
        if ending.interrupted or model.decoder.quantization is None or self._scheme:
            return None
        try:
            return guard_memory(
                lambda: base_losses(
                    engine, model.decoder, model.adapter, self.model_folder, data.validation_rows
                ),
                self.device,
            )
        except OutOfMemoryError:
            self._warn(["there is no memory for the losses on the original base; skipped"])
        except ModelError as error:  # The run is done, whatever became of the original meanwhile.
            self._warn([f"the losses on the original base are skipped: {error}"])
        return None

    def _show_results(
        self,
        ending: Ending,
        run: RunDirectory,
        tuned: list[Answer],
        evaluation: list[str],
        seconds: float,
    ) -> None:
        if compiling := compile_seconds():
            self._say(f"torch_compile: {compiling:.1f} s of it were spent on compiling")
        if unstopped := sum(not answer.stopped for answer in tuned):
            self._say(
                f"warning: {unstopped} of {plural(len(tuned), 'answer')} did not stop within"
                f" {plural(self.settings.sample_tokens, 'token')}"
            )
        duration = datetime.timedelta(seconds=round(seconds))
        self._say(f"{ending.ended}: {plural(ending.steps, 'step')} in {duration}")
        for line in evaluation:
            self._say(line)
        first, best = ending.first_validation_loss, ending.best_validation_loss
        which = ""
        if first is not None and best is not None:
            self._say(f"validation loss {first:.4f} -> {best:.4f}")
            which = " (the best)"
        self._say(f"adapter of step {ending.best_step}{which}: {run.adapter}")

    def _show_what_next(
        self, steps: Steps, run: RunDirectory, prompts: list[str], num_validation_rows: int
    ) -> None:
        """The commands that go on from here, each on a line of its own.

        Args:
            prompts: the first one is asked, where it fits on the line.
        """
        named = ("--adapter_path", run.path, *self._placed_elsewhere())
        short = [
            prompt
            for prompt in prompts
            if len(prompt) <= _SHORT and prompt.isprintable() and not prompt.startswith("-")
        ]
        commands = [
            command_line("ask", *named, short[0] if short else "What is Python?"),
            command_line("chat", *named),
        ]
        if num_validation_rows:  # Else there is nothing that it could measure by itself.
            commands.append(command_line("evaluate", *named))
        if steps.verdict == "too few":
            self._warn([f"{steps.title}; {steps.remedy}"])
            if steps.advised:
                again: dict[str, Any] = dict(steps.advised)
                if self.settings.batch_size != steps.settings.batch_size:  # Memory decided it.
                    again = {"batch_size": steps.settings.batch_size, **again}
                words = ("train", "--config", run.path / "config.yaml", *as_flags(again))
                commands.insert(0, command_line(*words))
        self.console.print("Next:")
        for command in commands:
            self.console.print(f"  {escape(command)}", soft_wrap=True)

    def _placed_elsewhere(self) -> list[str]:
        """The flag without which a base that did not fit would not fit now."""
        if self.settings.base_placement == "device":
            return []
        return as_flags({"base_placement": self.settings.base_placement})

    def _interrupted(self, stop: Stop, state: TrainingState) -> Interrupted:
        return stop.interrupted(
            f"interrupted by {stop.signal} after step {state.step} of"
            f" {self._total_steps(state)}; resume with:"
            f" {self._resume_command}"
        )

    def _non_finite(
        self, refused: NumbersRefused, state: TrainingState, run: RunDirectory
    ) -> NonFiniteError:
        """The error for numbers that stopped being finite, with the adapter at its best on disk."""
        if not refused.numbers.is_validation:
            state.restore_best()
        if not run.adapter.exists():
            self._save_adapter(run)
        remedy = (
            f"\nThe last good adapter is in {run.adapter}. Look at the rows that are named, try"
            " --precision fp32"
        )
        if checkpoints_of(run.checkpoints):
            rate = self.settings.learning_rate / 2
            remedy += (
                ", or resume from before it with half the learning rate:"
                f" {self._resume_command} --resume_with learning_rate={rate:g}"
            )
        else:  # Nothing was learnt yet.
            remedy += ", or download the model's files again"
        return NonFiniteError(f"{refused.numbers}{remedy}")

    def _out_of_memory(
        self, reason: str, data: PreparedData, budget: int, processes: Processes
    ) -> OutOfMemoryError:
        """The error that names the settings which would fit, as far as arithmetic can tell."""
        settings = self.settings.model_copy(update={"processes": processes.size})
        fitting = what_would_fit(
            settings, self.model_config, self.target_modules, data, budget, self._scheme
        )
        message = f"out of memory on {self.settings.device}: {reason}\n{fitting}"
        if checkpoints_of(self._output_dir / CHECKPOINTS):
            message += f"\nWith more memory it can be resumed: {self._resume_command}"
        return OutOfMemoryError(message)

    def _warn(self, lines: list[str]) -> None:
        for line in lines:
            self._say(f"warning: {line}")

    def _say(self, text: str) -> None:
        # A log keeps its lines whole; a terminal breaks them between words.
        self.console.print(escape(text), soft_wrap=not self.console.is_terminal)


# The name before other models than Phi-2 were trained.
Phi2LoRATrainer = LoRATrainer
