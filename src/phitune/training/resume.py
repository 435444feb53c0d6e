"""`--resume`: which run is resumed, from which checkpoint, and with which settings.

A checkpoint says what its run was made of (`Provenance`), and a resumed run is compared with it:
other settings, data or weights are refused, and another version or machine is reported. Tensors
are the matter of `state.py`, files that of `checkpoint.py`, and what may be changed that of
`changes.py`.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phitune import __version__
from phitune.config import (
    Resolved,
    Settings,
    setting_text,
    split_pairs,
    validated,
)
from phitune.data.prepare import PreparedData
from phitune.data.sources import hub_id
from phitune.data.steps import total_steps
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ResumeError, SettingsError, listing
from phitune.model.adapter_config import CONFIG_FILE
from phitune.model.files import SHIPPED_MODELS
from phitune.text import command_line, quoted
from phitune.training.changes import CHANGEABLE, parse_changes
from phitune.training.checkpoint import (
    DamagedCheckpointError,
    checkpoints_of,
    read_checkpoint,
    set_aside,
)
from phitune.training.events import RanOutOfMemory
from phitune.training.rundir import CHECKPOINTS, CONFIG, read_summary, refuse_if_held
from phitune.training.state import SAVED_NUMBERS, learning_rate_at

# -------------------------------------------------------------------------------------------------
# What a run is made of: settings, data, base model, versions, machine.
#
# Other settings, data or weights are refused, since the result would be neither that of the old
# run nor that of a new one; another version or machine is reported, as it may change the last bits.

_PLACES = ("dataset_path", "validation_path")


@dataclass(frozen=True)
class Provenance:
    """What a run is made of, in plain types except for the settings."""

    effective: Resolved  # with what was chosen for the user
    asked: Resolved  # as they were given
    fingerprints: dict[str, str]  # must not change
    surroundings: dict[str, str]  # changes are reported
    threads: int  # of torch; sums are split among them
    quantization: dict[str, Any] | None = None  # what was found of the base while it was loaded
    changes: list[dict[str, Any]] = field(default_factory=list)  # of settings, with the reason

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "effective": _resolved_as_json(self.effective),
            "asked": _resolved_as_json(self.asked),
        }

    def after(self, event: RanOutOfMemory, effective: Resolved) -> "Provenance":
        """After memory ran out: with the settings that the run has from now on."""
        effective = with_absolute_paths(effective)
        then = self.effective.settings.model_dump(mode="json")
        now = effective.settings.model_dump(mode="json")
        changes = [
            each.as_change(event.step, f"out of memory: {event.reason}")
            for each in differences(then, now)
        ]
        return replace(self, effective=effective, changes=[*self.changes, *changes])

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Provenance":
        """
        Raises:
            ValueError, KeyError, TypeError: another version wrote it.
        """
        return cls(
            _resolved_from_json(content["effective"]),
            _resolved_from_json(content["asked"]),
            content["fingerprints"],
            content["surroundings"],
            content["threads"],
            content.get("quantization"),
            content["changes"],
        )


@dataclass(frozen=True)
class Difference:
    """Something that changed since the run was saved."""

    name: str
    then: Any
    now: Any

    def as_change(self, after_step: int, why: str) -> dict[str, Any]:
        """Its entry in a checkpoint and in summary.json."""
        return {
            "after_step": after_step,
            "name": self.name,
            "then": self.then,
            "now": self.now,
            "why": why,
        }

    def __str__(self) -> str:
        return f"{self.name}: then {_shown(self.then)}, now {_shown(self.now)}"


def data_fingerprints(data: PreparedData, tokenizer: TextTokenizer) -> dict[str, str]:
    """What identifies the data: its tokens, not where they came from."""
    parts = {"training rows": data.train_rows, "validation rows": data.validation_rows}
    found = {
        name: f"{rows.fingerprint} ({len(rows)} rows, {rows.num_tokens:,} tokens)"
        for name, rows in parts.items()
    }
    return {**found, "tokenizer": tokenizer.fingerprint[:16]}


START_ADAPTER = "start adapter"  # among the fingerprints, where a run started from one


def surroundings(device_name: str, choices: Mapping[str, str]) -> dict[str, str]:
    """Versions, the machine, and what the engine chose on it.

    Args:
        device_name: the processor or card that computes.
        choices: the engine's, in words.
    """
    return {
        "python": platform.python_version(),
        "phitune": __version__,
        **{name: version(name) for name in ("torch", "safetensors", "tokenizers")},
        "system": f"{platform.system()} {platform.machine()}",
        "computed on": device_name,
        **choices,
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """The differences between two mappings."""
    names = dict.fromkeys([*then, *now])
    return [
        Difference(name, then.get(name), now.get(name))
        for name in names
        if then.get(name) != now.get(name)
    ]


def with_absolute_paths(resolved: Resolved) -> Resolved:
    """Settings whose paths mean the same from any folder."""
    settings = resolved.settings
    paths = {
        name: str(path.resolve())
        for name in _PLACES
        if (path := getattr(settings, name)) and not hub_id(path)
    }
    model = Path(settings.model_name).expanduser()
    if settings.model_name not in SHIPPED_MODELS and model.exists():  # A folder, or a GGUF file.
        paths["model_name"] = str(model.resolve())
    if settings.start_adapter:
        paths["start_adapter"] = str(settings.start_adapter.resolve())
    for path, _ in settings.mixed:
        if not hub_id(path):
            paths[f"mix {path}"] = str(path.resolve())
    mix = [f"{paths.get(f'mix {path}', path)}:{share}" for path, share in settings.mixed]
    for name, path in paths.items():
        if path.encode(errors="ignore") != path.encode(errors="surrogateescape"):
            raise SettingsError(
                f"{name} {path}: the name of a folder in it is not UTF-8 text, as it must be to be"
                " written into config.yaml; rename the folder"
            )
    values = {
        **settings.model_dump(),
        **{name: path for name, path in paths.items() if not name.startswith("mix ")},
        "mix": mix,
    }
    return Resolved(Settings.model_validate(values), resolved.origins)


def _resolved_as_json(resolved: Resolved) -> dict[str, Any]:
    return {
        "settings": resolved.settings.model_dump(mode="json"),
        "origins": resolved.origins,
    }


def _resolved_from_json(content: Mapping[str, Any]) -> Resolved:
    settings = Settings.model_validate(content["settings"])
    return Resolved(
        settings, {**dict.fromkeys(Settings.model_fields, "default"), **content["origins"]}
    )


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return " | ".join(map(str, value)) if isinstance(value, list) else str(value)


# -------------------------------------------------------------------------------------------------

AUTO = "auto"
# What the learning rate of a step follows from.
_SCHEDULE = ("epochs", "max_steps", "learning_rate", "lr_scheduler", "warmup_ratio")
STATE = "state.json"


@dataclass(frozen=True)
class Resumption:
    """A run to resume, and the checkpoint it is resumed from."""

    folder: Path
    checkpoint: Path  # its folder
    files: dict[str, bytes]
    state: dict[str, Any]  # its state.json
    saved: Provenance
    effective: Resolved
    asked: Resolved
    summary: dict[str, Any] | None  # of a finished run with nothing left to do
    changes: Mapping[str, str]  # what was asked to be changed
    notes: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)

    def command(self, **changes: Any) -> str:
        """The command that resumes this run, with changes of settings."""
        pairs = ",".join(f"{name}={setting_text(value)}" for name, value in changes.items())
        with_them = ("--resume_with", pairs) if pairs else ()
        return command_line("train", "--resume", self.folder, *with_them)

    def command_to_go_on(self) -> str:
        """The command that trains a finished run further, whatever it was that ended it."""
        progress, settings = self.state["progress"], self.effective.settings
        changes: dict[str, Any] = {**self.changes}
        if progress["epochs_done"] >= settings.epochs:
            changes["epochs"] = 2 * progress["epochs_done"]
        if settings.max_steps and progress["step"] >= settings.max_steps:
            changes["max_steps"] = 2 * progress["step"]
        patience = settings.early_stopping_patience
        without_gain = progress["validations_without_gain"]
        if patience and without_gain >= patience:
            changes["early_stopping_patience"] = patience + without_gain
        return self.command(**changes)

    def rate_note(self, steps_per_epoch: int) -> str | None:
        """How changed settings move the learning rate from one step to the next; None: as before.

        More epochs make a longer schedule: behind the end of one it leaps up.
        """
        step = self.state["progress"]["step"]
        then, now = self.saved.effective.settings, self.effective.settings
        if step == 0 or all(getattr(then, name) == getattr(now, name) for name in _SCHEDULE):
            return None

        def rate(settings: Settings, step: int) -> float:
            return learning_rate_at(
                step,
                total_steps=total_steps(settings, steps_per_epoch),
                warmup_ratio=settings.warmup_ratio,
                peak=settings.learning_rate,
                schedule=settings.lr_scheduler,
            )

        before, after = rate(then, step), rate(now, step + 1)
        as_planned = total_steps(then, steps_per_epoch) > step and after == rate(then, step + 1)
        if as_planned or after == before:
            return None
        way = "up" if after > before else "down"
        return (
            f"learning rate: goes {way} from {before:.2e} (step {step}) to {after:.2e} (step"
            f" {step + 1}), since the schedule is {now.lr_scheduler} over {_length(now)} now, not"
            f" {then.lr_scheduler} over {_length(then)}"
        )

    def check_unchanged(self) -> None:
        """To be called once the folder is locked.

        Raises:
            ResumeError: another process resumed the run in the meantime.
        """
        found = checkpoints_of(self.folder / CHECKPOINTS)
        if [path for path in found if path not in self.damaged][:1] != [self.checkpoint]:
            raise ResumeError(
                f"{self.folder}: another process resumed it in the meantime; start again"
            )

    def compare(self, now: Provenance) -> list[str]:
        """Reports what may change the last bits.

        Raises:
            ResumeError: the rows or the weights changed.
        """
        if found := differences(self.saved.fingerprints, now.fingerprints):
            raise ResumeError(
                f"{self.folder}: the data, the base model or the start adapter changed since the"
                " run was saved:\n"
                + listing([str(each) for each in found])
                + "\nRestore it as it was, or start a new run in another --output_dir."
            )
        notes = []
        found = differences(self.saved.surroundings, now.surroundings)
        if self.threads_to_use(now) != self.saved.threads:
            found.append(Difference("threads", self.saved.threads, now.threads))
        elif self.saved.threads != now.threads:
            notes.append(f"threads: {self.saved.threads}, as before in this run")
        if found:
            lines = listing([str(each) for each in found])
            notes.append(f"warning: what follows may differ in the last bits:\n{lines}")
        return notes

    def threads_to_use(self, now: Provenance) -> int:
        """The number of threads of the run, where this machine has as many processors; another one
        only by `--resume_with`.
        """
        asked = now.effective.settings.threads
        threads = asked if isinstance(asked, int) else self.saved.threads
        return threads if threads <= (os.cpu_count() or 1) else now.threads

    def resumed(self, now: Provenance, threads: int) -> Provenance:
        """The provenance of the resumed run, with the changes of settings."""
        then = self.saved.effective.settings.model_dump(mode="json")
        today = now.effective.settings.model_dump(mode="json")
        step = self.state["progress"]["step"]
        asked = now.asked.origins
        changes = [
            each.as_change(
                step, "--resume_with" if asked[each.name] == "resume_with" else "other memory"
            )
            for each in differences(then, today)
            if each.name in CHANGEABLE
        ]
        return replace(now, threads=threads, changes=[*self.saved.changes, *changes])

    def set_damaged_aside(self) -> None:
        for folder in self.damaged:
            set_aside(folder)


def run_to_resume(resolved: Resolved) -> Resumption | None:
    """The run that these settings ask to resume; None where a new one starts.

    Raises:
        ResumeError: there is no such run, it cannot be resumed, or settings differ.
    """
    settings = resolved.settings
    if settings.resume is None:
        if settings.resume_with:
            raise SettingsError(
                "resume_with: changes settings of a resumed run; name the run with --resume"
            )
        return None
    if settings.overwrite:
        raise SettingsError("resume and overwrite contradict each other; remove one of them")
    folder = _folder_of(settings)
    found = checkpoints_of(folder / CHECKPOINTS)
    if settings.resume == AUTO and not found:
        return None
    if not found:
        raise ResumeError(f"--resume {settings.resume}: {_why_nothing(folder)}")
    refuse_if_held(folder)
    return _resumption(folder, found, resolved)


def _folder_of(settings: Settings) -> Path:
    output_dir = settings.output_dir
    if settings.resume == AUTO:
        if output_dir is None:
            raise SettingsError("--resume auto: name the run's folder with --output_dir")
        return output_dir
    folder = Path(str(settings.resume)).expanduser()
    if output_dir is not None and output_dir.resolve() != folder.resolve():
        raise SettingsError(
            f"resume {folder} and output_dir {output_dir}: a run is resumed in its own folder;"
            " remove --output_dir"
        )
    return folder


def _why_nothing(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / CONFIG).exists() and (folder / CONFIG_FILE).is_file():
        return (
            "is an adapter, not a run that was stopped; for a second round of training from it,"
            f" with new data and from step 0: --start_adapter {quoted(folder)}"
        )
    if not (folder / CONFIG).exists():
        return f"is not a run, it has no {CONFIG}"
    if read_summary(folder):
        return "this run is finished and kept no checkpoints; there is nothing to do"
    return f"the run was stopped before its first checkpoint; start it anew: {_anew(folder)}"


def _anew(folder: Path) -> str:
    """The command that starts a run again from its first step, in its place."""
    words = ("--config", folder / CONFIG, "--output_dir", folder, "--overwrite")
    return command_line("train", *words)


def _resumption(folder: Path, found: list[Path], resolved: Resolved) -> Resumption:
    checkpoint, files, damaged = _newest_whole(found)
    try:
        state = json.loads(files[STATE])
        saved = Provenance.from_json(state["provenance"])
        progress = {name: state["progress"][name] for name in SAVED_NUMBERS}
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{checkpoint}: was written by another version of phitune ({error})"
        ) from None
    changes = parse_changes(resolved.settings.resume_with)
    effective, asked = _settings(folder, saved, resolved, changes)
    steps, kept = saved.effective.settings.rows_per_step, effective.settings.rows_per_step
    if steps != kept:
        raise ResumeError(
            f"resume_with: a step would have {kept} rows (batch_size x"
            f" gradient_accumulation_steps) instead of {steps}, which changes every later step;"
            " change both, so that their product stays"
        )
    limit = effective.settings.max_steps
    if "max_steps" in changes and limit and limit < progress["step"]:
        raise ResumeError(
            f"resume_with: max_steps {limit} is less than the {progress['step']} steps that the run"
            " has done; use more"
        )
    summary = read_summary(folder)
    if summary and _goes_further(saved.effective.settings, effective.settings, state):
        summary = None
    notes = [
        f"{path} is damaged ({why}); the previous one is used" for path, why in damaged.items()
    ]
    return Resumption(
        folder,
        checkpoint,
        files,
        state,
        saved,
        effective,
        asked,
        summary,
        changes,
        notes,
        list(damaged),
    )


def _newest_whole(found: list[Path]) -> tuple[Path, dict[str, bytes], dict[Path, str]]:
    """The latest intact checkpoint, its files, and what is wrong with later ones."""
    damaged: dict[Path, str] = {}
    for folder in found:
        files = _read_or_why(folder)
        if not isinstance(files, str):
            return folder, files, damaged
        damaged[folder] = files
    lines = [f"{folder}: {why}" for folder, why in damaged.items()]
    raise ResumeError(
        f"every checkpoint is damaged:\n{listing(lines)}\nStart the run anew:"
        f" {_anew(found[0].parents[1])}"
    )


def _read_or_why(folder: Path) -> dict[str, bytes] | str:
    """The files of a checkpoint, or what is wrong with it."""
    try:
        return read_checkpoint(folder)
    except DamagedCheckpointError as error:
        return str(error)


_OF_THE_COMMAND = ("overwrite", "resume", "resume_with", "processes")


def _settings(
    folder: Path, saved: Provenance, resolved: Resolved, changes: Mapping[str, str]
) -> tuple[Resolved, Resolved]:
    """The settings of the resumed run: effective, and as they were asked for.

    Raises:
        ResumeError: settings that were given differ from the run's.
        SettingsError: a changed value is not allowed.
    """
    given = with_absolute_paths(resolved)
    auto = resolved.settings.resume == AUTO
    differing = []
    for name in Settings.model_fields:
        if name in changes or name in (*_OF_THE_COMMAND, "output_dir"):
            continue
        then = getattr(saved.asked.settings, name)
        in_effect = getattr(saved.effective.settings, name)
        now = getattr(given.settings, name)
        is_given = given.origins[name] not in ("default", "chosen")
        was_given = saved.asked.origins[name] not in ("default", "chosen")
        if (is_given or (auto and was_given)) and now not in (then, in_effect):
            differing.append(Difference(name, in_effect, now))
    if differing:
        lines = [str(difference) for difference in differing]
        hint = "Remove them, or start a new run in another --output_dir (or with --overwrite)."
        if pairs := _as_changes(differing, saved.effective.settings):
            command = command_line("train", "--resume", folder, "--resume_with", pairs)
            hint += f" To change them in this run: {command}"
        raise ResumeError(f"{folder}: the run has other settings:\n{listing(lines)}\n{hint}")
    where = dict.fromkeys(changes, "in --resume_with")
    # The result does not depend on the number of processes, so that of this command counts.
    texts: dict[str, Any] = {"processes": resolved.settings.processes, **changes}
    if "sample_prompts" in texts:
        texts["sample_prompts"] = [texts["sample_prompts"]]
    now_in_effect, now_asked = (
        with_absolute_paths(
            Resolved(
                validated({**then.settings.model_dump(), **texts, "output_dir": folder}, where),
                {**then.origins, **dict.fromkeys(changes, "resume_with")},
            )
        )
        for then in (saved.effective, saved.asked)
    )
    return now_in_effect, now_asked


def _as_changes(differing: list[Difference], then: Settings) -> str:
    """What of these differences --resume_with can make, in its notation."""
    wanted = {each.name: each.now for each in differing if each.name in CHANGEABLE}
    sizes = ("batch_size", "gradient_accumulation_steps")
    now = then.model_copy(update={name: wanted[name] for name in sizes if name in wanted})
    if now.rows_per_step != then.rows_per_step:
        wanted = {name: value for name, value in wanted.items() if name not in sizes}
    pairs = []
    for name, value in wanted.items():
        texts = [setting_text(each) for each in (value if isinstance(value, list) else [value])]
        # Nothing, several prompts, or a text that would be taken for two pairs: no notation for it.
        if value is not None and len(texts) == 1 and len(split_pairs(f"{name}={texts[0]}")) == 1:
            pairs.append(f"{name}={texts[0]}")
    return ",".join(pairs)


def _length(settings: Settings) -> str:
    """How long the schedule is that they ask for."""
    limit = settings.max_steps
    return f"{settings.epochs} epochs" + (f" or {limit} steps" if limit else "")


def _goes_further(then: Settings, now: Settings, state: Mapping[str, Any]) -> bool:
    """Whether changed settings leave a finished run something to do."""
    progress = state["progress"]
    patience = now.early_stopping_patience
    is_patient = not patience or progress["validations_without_gain"] < patience
    has_steps = now.max_steps is None or progress["step"] < now.max_steps
    return bool(progress["epochs_done"] < now.epochs and has_steps and is_patient)
