"""A base model and the adapters on it, ready to answer: from folders to `ServedModel`.

What a run knows travels with its adapter: the base model's name, the tokenizer, the prompt format
(as the chat template that renders it) and the stop ids. Nothing of it is asked again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phitune.data.conversation import Turn
from phitune.data.prompt import ChatFormat, InstructFormat, PromptFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError
from phitune.inference.generate import Adapters, Answer, generate
from phitune.inference.sampling import GREEDY, Sampling
from phitune.jsonfile import read_object
from phitune.model.adapters import AdapterSet
from phitune.model.architecture import read_model_config
from phitune.model.decoder import Decoder
from phitune.model.device import DTYPES, choose_device, choose_precision
from phitune.model.files import fetch_weights, find_model
from phitune.model.lora import CONFIG_FILE, Adapter, detach, load_adapter
from phitune.model.weights import load_decoder

FormatName = Literal["instruct", "chat"]


@dataclass(frozen=True)
class ServedAdapter:
    """One adapter, and the form its prompts take."""

    name: str  # as the user named it
    folder: Path
    adapter: Adapter
    prompt_format: PromptFormat


class ServedModel:
    """One base in memory, any number of adapters beside it. `choice` is an adapter's number, or
    None for the base, which is asked in the first adapter's format.
    """

    def __init__(
        self,
        model_name: str,
        folder: Path,
        decoder: Decoder,
        tokenizer: TextTokenizer,
        prompt_format: PromptFormat,
        adapters: Sequence[ServedAdapter],
    ) -> None:
        self.model_name, self.folder = model_name, folder
        self.decoder, self.tokenizer = decoder, tokenizer
        self.prompt_format = prompt_format
        self.adapters = tuple(adapters)
        self.on_decoder = AdapterSet(decoder, [adapter.adapter for adapter in adapters])
        formats = [prompt_format, *(adapter.prompt_format for adapter in adapters)]
        self.stop_ids = sorted({i for one in formats for i in tokenizer.stop_ids(one)})

    def format_of(self, choice: int | None) -> PromptFormat:
        return self.prompt_format if choice is None else self.adapters[choice].prompt_format

    def prompt_ids(self, turns: Sequence[Turn], choice: int | None) -> list[int]:
        """Turns that end with a user's, as the ids that training put before the answer.

        Raises:
            ModelError: the format has no place for one of the turns.
        """
        return self.tokenizer.encode(self.format_of(choice).segments(turns))

    def text(self, answer_ids: Sequence[int], prompt_ids: Sequence[int], choice: int | None) -> str:
        """An answer's text, without its special tokens."""
        decoded = self.tokenizer.decode_answer(answer_ids, prompt_ids)
        return self.format_of(choice).response(decoded)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[int | None],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[Answer]:
        """All prompts (ids) in one batch, each answered with its own choice."""
        return generate(
            self.decoder,
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=self.stop_ids,
            sampling=sampling,
            adapters=Adapters(self.on_decoder, choices),
        )


def open_model(
    adapter_paths: Sequence[Path],
    *,
    model_name: str | None = None,
    prompt_format: FormatName | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> ServedModel:
    """Loads a base model once, and adapters beside it.

    Args:
        adapter_paths: run directories, or adapter folders written here or by PEFT.
        model_name: of the base; by default the one the adapters name.
        prompt_format: by default the one the adapter was trained in, as its chat template tells;
            instruct where it has none.

    Raises:
        ModelError: files missing, damaged or of another base.
        SettingsError: a device that is not there.
    """
    folders = [adapter_folder(path) for path in adapter_paths]
    model_name = model_name or base_model_name(folders)
    folder = find_model(model_name)
    config = read_model_config(folder)
    has_tokenizer = [(path / "tokenizer.json").is_file() for path in folders]
    tokenizer = TextTokenizer(folders[0] if folders and has_tokenizer[0] else folder)
    formats = [
        trained_format(TextTokenizer(path), prompt_format)
        if has
        else tokenizer.prompt_format(prompt_format or "instruct")
        for path, has in zip(folders, has_tokenizer, strict=True)
    ]
    torch_device = choose_device(device)
    fetch_weights(model_name, folder)
    dtype = DTYPES[choose_precision(precision, torch_device)]
    decoder = load_decoder(folder, config, dtype, torch_device)
    adapters = []
    for path, adapter_path, form in zip(adapter_paths, folders, formats, strict=True):
        adapters.append(
            ServedAdapter(str(path), adapter_path, load_adapter(decoder, adapter_path), form)
        )
        detach(decoder)
    base_format = formats[0] if formats else tokenizer.prompt_format(prompt_format or "instruct")
    return ServedModel(model_name, folder, decoder, tokenizer, base_format, adapters)


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
    raise ModelError(
        f"adapter_path {path}: holds no {CONFIG_FILE}; name a run directory or an adapter folder"
    )


def base_model_name(folders: Sequence[Path]) -> str:
    """The base model that these adapter folders were trained on.

    Raises:
        ModelError: none is named, or not the same.
    """
    named = {}
    for folder in folders:
        raw = read_object(folder / CONFIG_FILE, f"is {folder} an adapter folder?")
        named[folder] = raw.get("base_model_name_or_path")
    names = {str(name) for name in named.values() if name}
    if len(names) == 1:
        return names.pop()
    if not names:
        raise ModelError("no base model is named; name it with --model_name")
    listed = "\n".join(f"  {folder}: {name}" for folder, name in named.items())
    raise ModelError(
        f"the adapters are of different base models:\n{listed}\n"
        "Only adapters of one base can be loaded together; --model_name overrules their words."
    )


def trained_format(tokenizer: TextTokenizer, name: FormatName | None) -> PromptFormat:
    """The format that an adapter's tokenizer carries as its chat template; `name` overrules it."""
    if name is not None:
        return tokenizer.prompt_format(name)
    instruct = tokenizer.prompt_format("instruct")
    assert isinstance(instruct, InstructFormat)
    template = tokenizer.chat_template
    if not template or template == instruct.chat_template:
        return instruct
    try:
        return ChatFormat.from_template(
            template, tokenizer.special_tokens, tokenizer.control_tokens, tokenizer.bos_token
        )
    except ModelError as error:
        raise ModelError(f"{tokenizer.folder}: {error}") from None
