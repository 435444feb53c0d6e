"""One export, from its adapter to its folder: refused early, written, proven, renamed.

The formats write and prove themselves (safetensors.py, gguf.py) in a folder that takes its place
only when the proof has passed; nothing is left of an export that answers differently.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from phitune import __version__
from phitune.errors import ExportError
from phitune.export.folder import check_output, clear_leftovers, new_folder
from phitune.export.formats import ExportSettings
from phitune.export.gguf import export_gguf, export_gguf_lora
from phitune.export.proof import Proof, write_proof
from phitune.export.safetensors import export_adapter, export_merged
from phitune.export.source import Source
from phitune.inference.loaded import memory_errors
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.device import MLX, choose_device, limit_product_caches
from phitune.model.files import fetch_weights
from phitune.plan.machine import memory_budget
from phitune.plan.memory import GIB

# The program, the cache and the logits of a proof, beside the model's weights.
_PROOF_BYTES = GIB


def export(
    source: Source,
    output: Path,
    settings: ExportSettings,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Writes an export and proves it.

    With MLX as the device the proof computes on the CPU: it compares the weights one by one, and
    rounds them at random, in torch's tensors, which MLX's decoder has none of.

    Args:
        output: the folder to be; made as the last step.
        progress: called with (bytes written, bytes in all) as tensors are written.

    Raises:
        SettingsError: `output` exists or cannot be made.
        ExportError: the export does not answer as the adapter does; nothing is left of it.
        OutOfMemoryError: the model does not fit into memory.
    """
    clear_leftovers(output)
    check_output(output, overwrite=settings.overwrite)
    fetch_weights(source.model_name, source.model_folder)
    limit_product_caches()
    notes = source.notes
    if choose_device(settings.device) == MLX:
        settings = replace(settings, device="cpu")
        notes = (*notes, "note: the proof computes on the CPU, by torch, not by MLX")
    if settings.precision == "auto":
        needed, free = proof_bytes(source.config), memory_budget(choose_device(settings.device))
        settings = replace(settings, precision="fp32" if needed <= free.bytes else "bf16")
        if needed > free.bytes:
            notes = (
                *notes,
                f"note: the proof computes in bf16: fp32 takes {needed / GIB:.1f} GiB, and"
                f" {free.bytes / GIB:.1f} GiB are free on {choose_device(settings.device)}",
            )
    try:
        with (
            memory_errors("The proof loads the model once; try --precision bf16 or --device cpu."),
            new_folder(output) as folder,
        ):
            proof = _write_and_prove(source, folder, settings, progress)
            if not proof.passed:
                raise ExportError(
                    f"{output}: the export does not answer as the adapter does, so it was removed:"
                    f"\n{proof.sentence()}"
                )
            write_proof(folder, proof, {"phitune": __version__})
    except OSError as error:
        raise ExportError(
            f"{output}: cannot be written, and was removed: {error.strerror or error}"
        ) from None
    return replace(proof, notes=(*notes, *proof.notes))


def _write_and_prove(
    source: Source, folder: Path, settings: ExportSettings, progress: Callable[[int, int], None]
) -> Proof:
    match settings.format:
        case "merged":
            return export_merged(source, folder, settings, progress)
        case "adapter":
            return export_adapter(source, folder, settings)
        case "gguf":
            return export_gguf(source, folder, settings, progress)
        case "gguf-lora":
            return export_gguf_lora(source, folder, settings, progress)
    raise ValueError(f"{settings.format!r} is not a format")


def proof_bytes(config: ModelConfig) -> int:
    """The memory that a proof in fp32 takes: it has one model loaded at a time."""
    weights = Decoder(config, torch.float32, "meta").named_weights().values()
    return 4 * sum(weight.numel() for weight in weights) + _PROOF_BYTES
