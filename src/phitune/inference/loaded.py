"""A base model and the adapters on it, ready to answer: from folders to `LoadedModel`.

What a run knows travels with its adapter: the base model's name, the tokenizer, the prompt format
(as the chat template that renders it), the stop ids, and whether it was trained on conversations or
on single questions (in the head of the model card). Nothing of it is asked again. What an
adapter of another program does not say is assumed, with a warning: the base's own chat template, if
it has one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from phitune.apple.choice import limit_memory, load_decoder_on
from phitune.data.coder import Coder, FormatName
from phitune.data.tokenizer import TextTokenizer, read_chat_template
from phitune.errors import ModelError, OutOfMemoryError
from phitune.inference.generate import (
    GREEDY,
    Decoding,
    Sampling,
    generate,
    prepare_for_inference,
)
from phitune.model.adapter_config import CONFIG_FILE
from phitune.model.architecture import (
    BasePlacement,
    ModelConfig,
    notes_on_config,
    read_model_config,
)
from phitune.model.decoder import Decoder
from phitune.model.device import (
    DTYPES,
    choose_device,
    choose_precision,
    is_out_of_memory,
    limit_product_caches,
)
from phitune.model.files import ASSETS, SHIPPED_MODELS, fetch_weights, find_model, is_hub_id
from phitune.model.lora import WEIGHTS_FILE, Adapter, Adapters, AdapterSet, detach, load_adapter
from phitune.model.quantization import (
    QUANTIZATION_FILE,
    AskedQuantization,
    Quantization,
    as_held_on,
    choose_for_folder,
    quantization_from_json,
)
from phitune.model.scheme import read_scheme
from phitune.plan.machine import check_base_placement, memory_budget
from phitune.untrusted import own_file, read_object

# How a base is held that answers, or where.
AskedBase = AskedQuantization | Literal["ram", "disk"]

TOKENIZER_FILE, CARD_FILE = "tokenizer.json", "README.md"
_CONVERSATIONS = re.compile(r"^conversations: (true|false)$", re.MULTILINE)
_MAX_HEAD = 2**16  # characters of a card


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter, and the form its prompts take."""

    name: str  # as the user named it
    folder: Path
    adapter: Adapter
    coder: Coder


@dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt."""

    text: str  # without special tokens
    ids: tuple[int, ...]  # the stop token last, if it came to one
    stopped: bool  # by itself, with a stop token

    @property
    def tokens(self) -> int:
        """How many, the stop token included."""
        return len(self.ids)


@dataclass(eq=False, repr=False)
class LoadedModel:
    """One base in memory, any number of adapters beside it. `choice` is an adapter's number, or
    None for the base, which is asked in the first adapter's format, with its tokenizer.
    """

    model_name: str
    folder: Path
    decoder: Decoder
    base_coder: Coder
    adapters: Sequence[LoadedAdapter]
    warnings: Sequence[str] = ()  # for the user
    # What the first adapter was trained on, or the base without one; None if nothing says so.
    conversations: bool | None = None

    def __post_init__(self) -> None:
        self.adapters, self.warnings = tuple(self.adapters), tuple(self.warnings)
        self.on_decoder = AdapterSet(self.decoder, [each.adapter for each in self.adapters])

    @property
    def precision(self) -> str:
        """Of the base, as a person names it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.decoder.dtype)

    @property
    def takes_turns(self) -> bool:
        """Whether questions are turns of one conversation; else each of them is asked alone.

        As in training. Where nothing says what that was, models with a chat template take turns,
        and those in the instruct format (Phi-2, and adapters on it) do not.
        """
        if self.conversations is not None:
            return self.conversations
        return self.coder(self.first_choice).format_name == "chat"

    @property
    def first_choice(self) -> int | None:
        """The first adapter; the base where there is none."""
        return 0 if self.adapters else None

    def coder(self, choice: int | None) -> Coder:
        """Encodes what this choice is asked, and decodes what it answers."""
        return self.base_coder if choice is None else self.adapters[choice].coder

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[int | None],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[Answer]:
        """All prompts in one batch, each answered by its own choice.

        Args:
            prompts: B non-empty lists of ids.
            choices: [B] an adapter's number, or None for the base.
            seeds: [B] of what is drawn; see `Decoding`.
        """
        stops = [self.coder(choice).stop_ids for choice in choices]
        generated = generate(
            self.decoder,
            prompts,
            Decoding(max_new_tokens, (), sampling, seeds, stops),
            Adapters(self.on_decoder, choices),
        )
        return [
            Answer(
                self.coder(choice).decode_answer(ids, prompt),
                tuple(ids),
                stopped=bool(ids) and ids[-1] in stop_ids,
            )
            for ids, prompt, choice, stop_ids in zip(
                generated, prompts, choices, stops, strict=True
            )
        ]


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turns a failed allocation into an error that names the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines() or ["an allocation failed"]
        raise OutOfMemoryError(f"out of memory: {reason[0]}\n{remedy}") from None


def open_model(
    adapter_paths: Sequence[Path],
    *,
    model_name: str | None = None,
    prompt_format: FormatName | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    held: AskedBase = "trained",
) -> LoadedModel:
    """Loads a base model once, and adapters beside it.

    Args:
        adapter_paths: run directories, or adapter folders written here or by PEFT.
        model_name: of the base; by default the one the adapters name.
        prompt_format: by default the one the adapter was trained in, as its chat template tells;
            without an adapter, or where it has none, the base model's own; else instruct.
        held: how the base is held; "trained": as the adapters were trained on it; "none": in full,
            or as its files have it that are quantised already; "ram", "disk": in full, its layers
            there.

    Raises:
        ModelError: files missing, damaged or of another base.
        SettingsError: a device that is not there.
    """
    folders = [adapter_folder(path) for path in adapter_paths]
    named = base_names(folders)
    warnings = _other_bases(named, model_name) if model_name else []
    if model_name is None:
        model_name = base_model_name(named)
        try:
            folder = find_model(model_name)
        except ModelError as error:
            raise ModelError(
                f"{error}\nThat is the base model named in {next(iter(named)) / CONFIG_FILE}; name"
                " another place of it with --model_name."
            ) from None
    else:
        folder = find_model(model_name)
    try:
        config = read_model_config(folder)
    except ModelError as error:
        raise ModelError(f"model_name {model_name}: {error}") from None
    # Adapters are tried on a model without numbers: before gigabytes are fetched and read.
    for path in folders:
        load_adapter(Decoder(config, torch.float32, "meta"), path)
    coders = []
    for path in folders:
        coder, notes = read_coder(path, folder, config, prompt_format)
        coders.append(coder)
        warnings += notes
    base_coder = coders[0] if coders else read_coder(folder, folder, config, prompt_format)[0]
    chosen = choose_device(device)
    dtype = DTYPES[choose_precision(precision, chosen)]
    warnings += notes_on_config(folder)
    as_loaded: Quantization | BasePlacement | None = None
    if held == "ram" or held == "disk":
        check_base_placement(held, chosen.partition(":")[0])
        as_loaded = held
        if any(trained_quantization(each) for each in folders):
            warnings.append(
                "an adapter was trained on a base in fewer bits; with --base_placement"
                f" {held} the base is in full"
            )
    else:
        if held == "trained":
            as_loaded, notes = held_as_trained(folders, chosen)
            warnings += notes
        if as_loaded is None:  # Files that are quantised already are held as they are.
            asked = "none" if held == "trained" else held
            as_loaded, _ = choose_for_folder(read_scheme(folder), asked, "auto", chosen)
    fetch_weights(model_name, folder)
    limit_memory(chosen, memory_budget(chosen).bytes)
    limit_product_caches()  # Prompts have all lengths.
    decoder = prepare_for_inference(load_decoder_on(folder, config, dtype, chosen, as_loaded))
    adapters = []
    for path, adapter_path, coder in zip(adapter_paths, folders, coders, strict=True):
        adapter = load_adapter(decoder, adapter_path)
        adapters.append(LoadedAdapter(str(path), adapter_path, adapter, coder))
        detach(decoder)
    conversations = trained_on_conversations(folders[0] if folders else folder)
    return LoadedModel(model_name, folder, decoder, base_coder, adapters, warnings, conversations)


def held_as_trained(
    folders: Sequence[Path], device_name: str
) -> tuple[Quantization | None, list[str]]:
    """How the base was held that adapters were trained on, as far as this device can hold it so.

    Returns: None for full precision; and what to tell the user.
    """
    held = [trained_quantization(folder) for folder in folders]
    if not any(held):
        return None, []
    if any(each != held[0] for each in held):
        return None, [
            "the adapters were trained on bases held in different ways; the base is in full"
            " precision (--quantization changes that)"
        ]
    assert held[0]
    return as_held_on(held[0], device_name)


def trained_quantization(folder: Path) -> Quantization | None:
    """How the base was held that an adapter was trained on; None for full precision.

    Raises:
        ModelError: the file that says so is damaged.
    """
    path = own_file(folder / QUANTIZATION_FILE)
    if path is None:
        return None
    content = read_object(path, "")
    try:
        return quantization_from_json(content)
    except ModelError as error:
        raise ModelError(f"{folder / QUANTIZATION_FILE}: {error}") from None


def trained_on_conversations(folder: Path) -> bool | None:
    """What the model card of a folder says; None if it does not, or there is none."""
    with suppress(OSError, ModelError):
        if path := own_file(folder / CARD_FILE):
            with path.open(encoding="utf-8", errors="replace") as file:
                _, _, rest = file.read(_MAX_HEAD).partition("---\n")
            if found := _CONVERSATIONS.search(rest.partition("\n---\n")[0]):
                return found[1] == "true"
    return None


def read_coder(
    path: Path, base: Path, config: ModelConfig, name: FormatName | None
) -> tuple[Coder, list[str]]:
    """The tokenizer and the format that a folder was used with, and what is assumed of them.

    A folder of another program may have neither: then they are those of the base alone, which is
    what a base is trained in by most programs.

    Args:
        path: of an adapter, or the base itself.
        name: of the format; None for the one that the chat template renders.

    Raises:
        ModelError: there is no usable tokenizer, or it does not belong to the base.
    """
    own = path == base or (path / TOKENIZER_FILE).is_file()
    tokenizer = TextTokenizer(path if own else base)
    if tokenizer.size > config.vocab_size:
        raise ModelError(
            f"{tokenizer.folder / TOKENIZER_FILE}: has {tokenizer.size} tokens, the model in {base}"
            f" {config.vocab_size}; they do not belong together, name another with --model_name"
        )
    if name == "instruct":
        return Coder.of(tokenizer, name), []
    template = read_chat_template(path)
    tokenizer.chat_template = template or read_chat_template(base)
    if name is not None:
        return Coder.of(tokenizer, name), []
    trained = template and path != base
    coder = Coder.as_saved(tokenizer, "" if trained else "use --prompt_format instruct")
    if template or path == base:
        return coder, []
    if tokenizer.chat_template:
        assumed = (
            "the prompt format is assumed to be the base model's chat template;"
            " --prompt_format instruct changes that"
        )
    else:
        assumed = (
            "neither has its base model; the prompt format is assumed to be instruct; a"
            " chat_template.jinja in the folder and --prompt_format chat change that"
        )
    return coder, [f"{path}: has no chat template; {assumed}"]


def adapter_folder(path: Path) -> Path:
    """The adapter in a run directory, or the folder itself.

    Raises:
        ModelError: there is no adapter.
    """
    path = path.expanduser()
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not path.exists():
        raise ModelError(f"adapter_path {path}: there is no such folder")
    if (path / WEIGHTS_FILE).is_file() or (path / "adapter" / WEIGHTS_FILE).is_file():
        raise ModelError(
            f"adapter_path {path}: has {WEIGHTS_FILE} without {CONFIG_FILE}, which says what the"
            " numbers mean; copy both"
        )
    inside = sorted(each.parent.name for each in path.glob(f"*/{CONFIG_FILE}"))
    raise ModelError(
        f"adapter_path {path}: holds no {CONFIG_FILE}; name "
        + (
            f"one of its folders: {', '.join(inside[:5])}"
            if inside
            else "a run directory or an adapter folder"
        )
    )


def base_names(folders: Sequence[Path]) -> dict[Path, str]:
    """The base model that each adapter folder names; those that name none are left out.

    Raises:
        ModelError: a folder's configuration cannot be read.
    """
    named = {}
    for folder in folders:
        raw = read_object(folder / CONFIG_FILE, f"is {folder} an adapter folder?")
        if name := raw.get("base_model_name_or_path"):
            named[folder] = str(name)
    return named


def base_model_name(named: Mapping[Path, str]) -> str:
    """The one base model that all of `base_names` agree on.

    Raises:
        ModelError: none is named, not the same, or a revision of it.
    """
    names = set(named.values())
    if len(names) == 1:
        for folder, name in named.items():
            revision = read_object(folder / CONFIG_FILE, "").get("revision")
            if revision not in (None, "", "main") and is_hub_id(name):
                raise ModelError(
                    f"{folder / CONFIG_FILE}: names revision {revision!r} of {name} as its base,"
                    " and only the newest is fetched; download that revision, and name its folder"
                    " with --model_name"
                )
        return names.pop()
    if not names:
        raise ModelError("the base model is not known; specify it with --model_name")
    listed = "\n".join(f"  {folder}: {name}" for folder, name in named.items())
    raise ModelError(
        f"the adapters are of different base models:\n{listed}\n"
        "Only adapters of one base can be loaded together; --model_name overrides this."
    )


def _other_bases(named: Mapping[Path, str], model_name: str) -> list[str]:
    """A warning for each adapter that names another base than the one asked for."""
    return [
        f"{folder} was trained on {name}, and is used on {model_name} because of --model_name"
        for folder, name in named.items()
        if name != model_name and _resolved(name) != _resolved(model_name)
    ]


def _resolved(name: str) -> Path:
    return ASSETS / name if name in SHIPPED_MODELS else Path(name).expanduser().resolve()
