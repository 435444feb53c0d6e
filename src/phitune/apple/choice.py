"""A decoder and its engine, computed by torch or by MLX as the device says; loads MLX only then.

"mlx" is the name of a device for the user; torch has none of that name. What MLX takes and gives
are torch's tensors on the CPU.
"""

from pathlib import Path

import torch

from phitune.config import Settings
from phitune.errors import SettingsError
from phitune.model.architecture import BasePlacement, ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.device import MLX, torch_device
from phitune.model.engine import Engine, FusedEngine, ReferenceEngine
from phitune.model.fused import Packed
from phitune.model.quantization import Quantization, load_quantized
from phitune.model.residence import load_placed
from phitune.model.weights import load_decoder


def load_decoder_on(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device_name: str,
    held: Quantization | BasePlacement | None = None,
    rows: Packed | None = None,
) -> Decoder:
    """Builds the decoder of a model folder on a device; see `weights.load_decoder`.

    Args:
        held: its layers in fewer bits, or in another place; None for neither.
        rows: of the data, see `quantization.load_quantized`.

    Returns: for "mlx" an `MlxDecoder`.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    device = torch_device(device_name)
    if device_name == MLX:
        from phitune.apple.decoder import load_mlx_decoder

        quantization = held if isinstance(held, Quantization) else None
        bits = {"int8": 8, "int4": 4}[quantization.kind] if quantization else None
        decoder = load_mlx_decoder(folder, config, dtype, bits)
        decoder.quantization = quantization
        return decoder
    if isinstance(held, Quantization):
        return load_quantized(folder, config, dtype, device, held, rows)
    if held in ("ram", "disk"):
        return load_placed(folder, config, dtype, device, held)
    return load_decoder(folder, config, dtype, device)


def check_reference(device_name: str) -> None:
    """
    Raises:
        SettingsError: the reference engine is asked for where MLX has the weights.
    """
    if device_name == MLX:
        raise SettingsError(
            "engine reference: it is torch's, and device mlx has the weights in MLX; use --device"
            " cpu or mps with it, or --engine fused"
        )


def reference_engine(
    decoder: Decoder, recompute_layers: int, *, torch_compile: bool = False
) -> Engine:
    """Plain torch under autograd.

    Raises:
        SettingsError: see `check_reference`.
    """
    check_reference(decoder.runs_on)
    return ReferenceEngine(decoder, recompute_layers, torch_compile=torch_compile)


def fast_engine(
    decoder: Decoder,
    dropout_rate: float,
    recompute_layers: int,
    *,
    torch_compile: bool = False,
    keep_freed: bool = True,
) -> Engine:
    """The engine with a backward by hand: `FusedEngine`, or MLX's for a decoder of MLX."""
    if not decoder.is_mlx:
        return FusedEngine(
            decoder,
            dropout_rate,
            recompute_layers,
            torch_compile=torch_compile,
            keep_freed=keep_freed,
        )
    from phitune.apple.decoder import MlxDecoder
    from phitune.apple.engine import MlxEngine

    assert isinstance(decoder, MlxDecoder)
    return MlxEngine(decoder, dropout_rate, recompute_layers)


def engine_of(decoder: Decoder, settings: Settings, *, keep_freed: bool) -> Engine:
    """The engine that settings ask for.

    Args:
        keep_freed: see `FusedEngine`.
    """
    layers = settings.recompute_layers
    count = decoder.config.num_hidden_layers if layers == "all" else layers or 0
    compiles = settings.torch_compile
    if settings.engine == "reference":
        return reference_engine(decoder, count, torch_compile=compiles)
    return fast_engine(
        decoder, settings.lora_dropout, count, torch_compile=compiles, keep_freed=keep_freed
    )


def limit_memory(device_name: str, budget: int) -> None:
    """Has MLX keep within a number of bytes, where it is what computes."""
    if device_name == MLX:
        from phitune.apple.memory import set_limits

        set_limits(budget)
