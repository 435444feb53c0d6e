"""`phitune export`: an adapter as a folder that others load, proven to answer the same."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from phitune.commands.options import RunOptions, one_of, option, parse, switch
from phitune.commands.terminal import INLINE, print_json
from phitune.config import UserPath
from phitune.export.formats import DEFAULT_QUANTIZATION, FORMATS, QUANTIZATIONS, ExportSettings
from phitune.model.files import is_hub_id
from phitune.text import command_line, in_bytes, plural, shell_line

if TYPE_CHECKING:
    from phitune.export.proof import Proof
    from phitune.export.source import Source


def _size(text: Any) -> int:
    """ "5GB", "500MB" or "2GiB" in bytes."""
    size = in_bytes(str(text))
    if not size:
        raise ValueError("is not a size; write it like 5GB or 500MB")
    return size


_PART = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)


def _repository(name: str) -> str:
    """owner/name, as the hub takes it."""
    parts = name.split("/")
    if len(parts) != 2 or not all(map(_PART.fullmatch, parts)) or name.endswith((".git", ".ipynb")):
        raise ValueError(
            "must be OWNER/NAME: your name or that of an organization on the hub, and a name of"
            " letters, digits, hyphens, dots and underscores"
        )
    return name


class ExportOptions(RunOptions):
    """Write an adapter in the form that another program loads. The result is loaded again and its
    answers are compared with the adapter's; a result that differs is removed."""

    usage = "export RUN_OR_ADAPTER --format FORMAT [flags]"
    epilog = (
        "phitune export --push OWNER/NAME --output_dir EXPORT uploads an export that lies there."
    )

    format: Annotated[str, one_of(FORMATS)] | None = option(
        None,
        "; ".join(f"{name}: {format_.what}" for name, format_ in FORMATS.items()),
        group="export",
        metavar="|".join(FORMATS),
    )
    output_dir: UserPath | None = option(
        None, "a new folder (default: RUN-FORMAT beside the run)", group="export"
    )
    overwrite: bool = switch(
        "replace an earlier export in output_dir; nothing else is ever replaced", group="export"
    )
    dtype: Literal["base", "fp32", "bf16"] | None = option(
        None,
        "merged: dtype of the weights (default: base, the dtype of the base model's files)",
        group="export",
    )
    max_shard_size: Annotated[int, BeforeValidator(_size)] | None = option(
        None,
        "merged: size of the largest file, such as 5GB or 500MB (default: 5GB)",
        group="export",
        metavar="SIZE",
    )
    merge_into: Literal["original", "trained"] | None = option(
        None,
        "merged, where the run's base was quantised: into the original (default), or into the"
        " numbers that it was trained on, expanded",
        group="export",
    )
    quantization: (
        Annotated[str, BeforeValidator(lambda name: str(name).lower()), one_of(QUANTIZATIONS)]
        | None
    ) = option(
        None,
        f"gguf: type of the weights, one of {', '.join(QUANTIZATIONS)}"
        f" (default: {DEFAULT_QUANTIZATION})",
        group="export",
        metavar="TYPE",
    )

    as_json: bool = switch(
        "what was written and how it was proven, as JSON", group="export", alias="json"
    )

    push: Annotated[str, AfterValidator(_repository)] | None = option(
        None,
        "upload the proven export to this repository of the Hugging Face hub; a new one is private",
        group="hub",
        metavar="OWNER/NAME",
    )
    public: bool = switch("push: everybody may see and load it", group="hub")
    push_overwrite: bool = switch(
        "push: replace what the repository holds, in a new commit", group="hub"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "ExportOptions":
        if self.push is None:
            for name in ("public", "push_overwrite"):
                if getattr(self, name):
                    raise ValueError(f"--{name} has no effect without --push OWNER/NAME")
        elif self.as_json:
            raise ValueError("--json tells of an export, not of an upload; leave out --push")
        elif self.is_upload_only:
            for name in sorted(self.model_fields_set - set(_OF_AN_UPLOAD)):
                raise ValueError(
                    f"--{name} has no effect on an export that is there already; to make one, name"
                    " the adapter with --adapter_path, and --format"
                )
            if self.output_dir is None:
                raise ValueError(
                    "--push needs an export: --adapter_path and --format make one, --output_dir"
                    " alone names one that is there"
                )
            return self
        if not self.adapter_path:
            raise ValueError("--adapter_path is missing: the run directory or adapter to export")
        if self.format is None:
            raise ValueError(f"--format is missing: one of {', '.join(FORMATS)}")
        for name in self.of_format():
            if name not in FORMATS[self.format].options:
                takers = [key for key, format_ in FORMATS.items() if name in format_.options]
                raise ValueError(
                    f"--{name} has no effect on --format {self.format}; it is for"
                    f" {', '.join(takers)}"
                )
        return self

    @property
    def is_upload_only(self) -> bool:
        """Whether an export that is there is uploaded, and none is made."""
        return self.push is not None and not self.adapter_path and self.format is None

    def of_format(self) -> dict[str, Any]:
        """The given options that only some formats have."""
        names = {name for format_ in FORMATS.values() for name in format_.options}
        return {name: getattr(self, name) for name in sorted(names & self.model_fields_set)}


_OF_AN_UPLOAD = ("push", "public", "push_overwrite", "output_dir")


@dataclass(frozen=True)
class ExportDocument:
    """What `export --json` prints."""

    output: Path  # the folder, absolute
    sentence: str  # the proof, for people
    next: tuple[str, ...]  # commands that ask what was written
    proof: "Proof" = field(metadata=INLINE)


def run(argv: list[str]) -> int:
    """Exports one adapter, or uploads an export; returns the exit code."""
    options = parse(ExportOptions, argv)
    if options.is_upload_only:
        assert options.output_dir  # `_goes_together` has seen to it.
        return _upload(options, options.output_dir)
    adapter_path, format_name = options.adapter_path[0], str(options.format)
    # A name at the end, also of "." and of "output/run/".
    whole = adapter_path.expanduser().resolve()
    output: Path = options.output_dir or whole.with_name(f"{whole.name}-{format_name}")
    settings = ExportSettings(
        format=format_name,
        overwrite=options.overwrite,
        device=options.device,
        precision=options.precision,
        **options.of_format(),
    )

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from phitune.export.job import export
    from phitune.export.source import open_source

    console, errors = Console(highlight=False), Console(stderr=True)
    if options.push:
        _check_before_work(options, output.expanduser())
    source = open_source(adapter_path, options.model_name, options.prompt_format)
    if options.push:
        _check_base(options, source.model_name)
    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    with bar:
        task = bar.add_task("writing", total=None)
        proof = export(
            source,
            output.expanduser(),
            settings,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    next_ = next_lines(settings.format, output.expanduser(), source)
    if options.as_json:
        print_json(ExportDocument(output.absolute(), proof.sentence(), tuple(next_), proof))
        return 0
    for line in (
        *proof.notes,
        f"{proof.compared}: {proof.sentence()}",
        f"{settings.format}: {output}",
        *next_,
    ):
        console.print(escape(line), soft_wrap=not console.is_terminal)
    return _upload(options, output.expanduser()) if options.push else 0


def next_lines(format_name: str, folder: Path, source: "Source") -> list[str]:
    """The commands that ask what was written, one to a line, to be copied."""
    if format_name == "merged":
        load = f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto')"
        return [
            f"run it: {command_line('chat', '--model_name', folder)}",
            f"in Python: model = {load}",
        ]
    if format_name == "adapter":
        base = source.model_name if is_hub_id(source.model_name) else str(source.model_folder)
        load = f"transformers.AutoModelForCausalLM.from_pretrained({base!r})"
        return [
            f"run it: {command_line('chat', '--adapter_path', folder)}",
            f"in Python: model = peft.PeftModel.from_pretrained({load}, {str(folder)!r})",
        ]
    from phitune.export.gguf import MODELFILE
    from phitune.export.gguf_file import safe_context

    (file,), context = folder.glob("*.gguf"), str(safe_context(source.config))
    if format_name == "gguf-lora":
        template = folder / "chat_template.jinja"
        words = ["-m", "BASE.gguf", "--lora", file, "--chat-template-file", template, "-c", context]
        return [
            f"run it: {shell_line('llama-cli', *words)}",
            f"  where BASE.gguf is a llama.cpp file of {source.model_name}",
        ]
    lines = [f"run it: {shell_line('llama-cli', '-m', file, '-c', context)}"]
    if (folder / MODELFILE).is_file():
        lines.append(
            f"or in Ollama: {shell_line('ollama', 'create', 'my-model', '-f', folder / MODELFILE)}"
            " && ollama run my-model"
        )
    return lines


# --- the hub --------------------------------------------------------------------------------------


def _again(options: ExportOptions, output: Path) -> str:
    """The command that uploads an export which is there."""
    words = ["--push", str(options.push), "--output_dir", str(output)]
    words += ["--public"] * options.public + ["--push_overwrite"] * options.push_overwrite
    return command_line("export", *words)


def _check_before_work(options: ExportOptions, output: Path) -> None:
    """Refuses what the upload would fail on, before an export is made.

    Raises:
        SettingsError: see `open_repository` and `check_free`; or an export lies in `output`.
    """
    from phitune.errors import SettingsError
    from phitune.export.hub import check_free, open_repository
    from phitune.export.proof import PROOF_FILE

    if (output / PROOF_FILE).is_file() and not options.overwrite:
        raise SettingsError(
            f"output_dir {output}: holds an export already; upload it with:\n"
            f"  {_again(options, output)}\nor replace it with --overwrite"
        )
    repository = open_repository(str(options.push), public=options.public)
    check_free(repository, replace=options.push_overwrite)


def _check_base(options: ExportOptions, model_name: str) -> None:
    """Refuses an adapter whose base only this machine has: nobody else could load it.

    Raises:
        SettingsError: it names its base by a folder.
    """
    from phitune.errors import SettingsError
    from phitune.model.files import SHIPPED_MODELS

    whole = options.format in ("merged", "gguf")
    if not whole and model_name not in SHIPPED_MODELS and not is_hub_id(model_name):
        raise SettingsError(
            f"--push {options.push}: the adapter's base is {model_name}, a folder that others do"
            " not have; name the same model on the hub with --model_name owner/name, or export"
            " --format merged"
        )


def _upload(options: ExportOptions, output: Path) -> int:
    """Uploads an export as it was proven; returns the exit code.

    Raises:
        SettingsError: the export or the repository is not fit for it.
        ExportError: the upload failed; it can be repeated.
    """
    from phitune.export.hub import check_free, is_there, open_repository, proven_files, push

    repository = open_repository(str(options.push), public=options.public)
    files = proven_files(output)
    if is_there(repository, output, files):
        print(f"{repository.name}: holds this export already; nothing to upload")
        return 0
    check_free(repository, replace=options.push_overwrite)
    print(
        f"uploading {plural(len(files), 'file')} to {repository.name} ({repository.kind}); if that"
        f" is interrupted, repeat it with: {_again(options, output)}",
        flush=True,
    )
    print(f"pushed: {push(repository, output, files)} ({repository.kind})")
    return 0
