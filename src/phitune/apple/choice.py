"""Which library computes: torch, on a device of its own, or MLX. Loads neither before it is asked.

"mlx" is the name of a device for the user; torch has none of that name. What MLX takes and gives
are torch's tensors on the CPU.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from phitune.model.architecture import ModelConfig
    from phitune.model.decoder import Decoder

MLX = "mlx"


def torch_device(name: str) -> "torch.device":
    """Where torch's tensors are, with a device of this name: "cpu", "mps", "cuda", "cuda:N", "mlx".

    Whether the machine has it is not looked at.
    """
    import torch

    return torch.device("cpu" if name == MLX else name)


def load_decoder_on(
    folder: Path, config: "ModelConfig", dtype: "torch.dtype", device_name: str
) -> "Decoder":
    """Builds the decoder of a model folder on a device; see `weights.load_decoder`.

    Returns: for "mlx" an `MlxDecoder`.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    if device_name == MLX:
        from phitune.apple.decoder import load_mlx_decoder

        return load_mlx_decoder(folder, config, dtype)
    from phitune.model.weights import load_decoder

    return load_decoder(folder, config, dtype, torch_device(device_name))
