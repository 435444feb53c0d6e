"""The adapter that is exported, with its base's files and its tokenizer and prompt format.

Everything that does not need the weights of the base is read and checked first; the model itself
is loaded when an export is proven.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from phitune.data.coder import Coder, FormatName
from phitune.data.tokenizer import NoDefaultTemplateError, read_chat_template
from phitune.errors import SettingsError
from phitune.export.card import TrainedAdapter
from phitune.inference.loaded import (
    LoadedModel,
    adapter_folder,
    base_model_name,
    base_names,
    open_model,
    read_coder,
    trained_quantization,
)
from phitune.model.architecture import ModelConfig, read_model_config
from phitune.model.decoder import META, Decoder
from phitune.model.files import find_model
from phitune.model.lora import Adapter, read_adapter
from phitune.model.quantization import held_weights
from phitune.model.scheme import read_scheme
from phitune.model.tensors import Weight
from phitune.model.weights import weights_in
from phitune.training.rundir import CONFIG


@dataclass(frozen=True)
class Source(TrainedAdapter):
    """An adapter to be exported; no weights of its base."""

    model_folder: Path
    config: ModelConfig
    adapter: Adapter  # on the CPU, on no decoder
    format_name: FormatName | None  # as asked; None for the format it was trained in
    notes: tuple[str, ...]  # for the user: the chat template that is written, and what is assumed

    def load(
        self,
        device: str,
        precision: Literal["auto", "fp32", "bf16"],
        merge_into: Literal["original", "trained"] = "original",
    ) -> LoadedModel:
        """The base in memory with the adapter as its only one.

        Two models may not fit: let go of it before another one is loaded.

        Args:
            merge_into: "trained" for the numbers that the adapter was trained on, expanded.
        """
        loaded = open_model(
            [self.adapter_folder],
            model_name=self.model_name,
            prompt_format=self.format_name,
            device=device,
            precision=precision,
            held="none" if merge_into == "original" else "trained",
        )
        if merge_into == "trained":
            for linear in set(loaded.decoder.fused_linears().values()):
                linear.hold_expanded()
        return loaded

    def trained_weights(self) -> dict[str, Weight]:
        """The base's weights by name, as the numbers that the adapter was trained on.

        Raises:
            SettingsError: those are the original's.
        """
        held, decoder = (
            trained_quantization(self.adapter_folder),
            Decoder(self.config, torch.float32, META),
        )
        if held is None and read_scheme(self.model_folder) is None:
            raise SettingsError(
                "merge_into trained: the adapter was trained on the original in full; leave it out"
            )
        weights = weights_in(self.model_folder, decoder)
        return weights if held is None else held_weights(weights, decoder, held)


def open_source(
    adapter_path: Path, model_name: str | None, prompt_format: FormatName | None
) -> Source:
    """Reads everything about an adapter that does not need the weights of its base.

    Raises:
        ModelError: files missing or damaged, or an adapter that does not fit its base.
    """
    folder = adapter_folder(adapter_path)
    name = model_name or base_model_name(base_names([folder]))
    model_folder = find_model(name)
    config = read_model_config(model_folder)
    coder, warnings = read_coder(folder, model_folder, config, prompt_format)
    return Source(
        model_name=name,
        adapter_folder=folder,
        coder=coder,
        run=next((path for path in (folder, folder.parent) if (path / CONFIG).is_file()), None),
        model_folder=model_folder,
        config=config,
        adapter=read_adapter(config, folder),
        format_name=prompt_format,
        notes=(*(f"warning: {line}" for line in warnings), _template_note(coder, model_folder)),
    )


def _template_note(coder: Coder, model_folder: Path) -> str:
    """Which chat template an export writes."""
    written = coder.prompt_format.chat_template
    try:
        own = read_chat_template(model_folder)
    except NoDefaultTemplateError:
        return "note: the chat template is the adapter's own, in place of the base model's several"
    if written == own:
        return "note: the chat template is the base model's own"
    what = "that of the instruct format" if coder.format_name == "instruct" else "the adapter's own"
    instead = ", in place of the base model's" if own else ""
    return f"note: the chat template is {what}{instead}"
