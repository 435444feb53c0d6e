"""The base model's tensors with an adapter merged into them, one at a time.

W + scaling * B A is computed in fp32 at least and rounded once. No more than one tensor is in
memory: each is read from its file when it is asked for, and its mapped pages are given back.

Names are those of transformers' files, whose modules are those that adapters are on; how our
decoder fuses them plays no part.

Shapes: O out, D in, R rank, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from phitune.model.architecture import LM_HEAD, ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.linear import LoraPair
from phitune.model.lora import Adapter
from phitune.model.targets import EMBEDDING_MODULE
from phitune.model.weights import EMBEDDING, PIECE_BYTES, checked_headers, torch_type

HEAD = f"{LM_HEAD}.weight"


@dataclass(frozen=True)
class Planned:
    """A tensor as it will be yielded, and where its base lies."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dtype_in_file: torch.dtype
    file: Path
    name_in_file: str  # of an untied head, the token table's
    pair: LoraPair | None

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def merged_tensors(
    folder: Path, config: ModelConfig, adapter: Adapter | None
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model folder under transformers' names, with the adapter in them.

    Args:
        folder: of the base model; its files are read one after the other.
        adapter: with its matrices on the CPU, see `read_adapter`; None for the base as it is.

    Yields: (name, tensor on the CPU, in the base's own dtype).

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    for planned in plan_tensors(folder, config, adapter):
        yield planned.name, merged(planned)


def unties(config: ModelConfig, adapter: Adapter | None) -> bool:
    """Whether the merged model has a head of its own although the base shares its token table.

    An adapter on one of the two modules moves that one alone, so that they are no longer the same.
    """
    on_either = adapter is not None and not {EMBEDDING_MODULE, LM_HEAD}.isdisjoint(adapter.pairs)
    return config.tie_word_embeddings and on_either


def plan_tensors(
    folder: Path,
    config: ModelConfig,
    adapter: Adapter | None,
    dtype: torch.dtype | None = None,
) -> list[Planned]:
    """What `merged_tensors` yields, from the files' headers alone.

    Args:
        dtype: of all tensors; by default each keeps the one it has in its file.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    decoder = Decoder(config, torch.float32, "meta")
    names = decoder.named_weights()
    pairs = {f"{module}.weight": pair for module, pair in adapter.pairs.items()} if adapter else {}
    planned = []
    for name, header in checked_headers(decoder, folder).items():
        if name not in names:
            continue  # A tied head or rotary tables, which repeat what is known.
        rest = (header.shape, dtype or torch_type(header), torch_type(header), header.file, name)
        planned.append(Planned(name, *rest, pairs.get(name)))
        if name == EMBEDDING and unties(config, adapter):
            planned.append(Planned(HEAD, *rest, pairs.get(HEAD)))
    return planned


@torch.no_grad()
def merged(planned: Planned) -> Tensor:
    """One tensor, read and merged piece by piece. Returns: [O, D], or [O] of biases and norms."""
    out = torch.empty(planned.shape, dtype=planned.dtype)
    # A piece is held twice in the wider type that the sum is computed in.
    rows = max(1, PIECE_BYTES * len(out) // max(out.nbytes, 1))
    for start in range(0, len(out), rows):
        part = slice(start, start + rows)
        # Opened for each piece: closing the file gives its mapped pages back.
        with safe_open(planned.file, framework="pt") as file:
            piece = file.get_slice(planned.name_in_file)[part]
            if planned.pair is None:
                out[part].copy_(piece)
                continue
            wide = torch.promote_types(piece.dtype, torch.float32)
            out[part].copy_(piece.to(wide) + update(planned.pair, part, wide, planned.name))
    return out


def update(pair: LoraPair, rows: slice, dtype: torch.dtype, name: str) -> Tensor:
    """What an adapter adds to some rows of the weight of this name. Returns: [rows, D]."""
    lora_A, lora_B = pair.lora_A.detach().to(dtype), pair.lora_B.detach().to(dtype)
    if name == EMBEDDING:  # Rows are tokens: A is [R, V], B is [D, R].
        return (lora_A[:, rows].t() @ lora_B.t()).mul_(pair.scaling)
    return (lora_B[rows] @ lora_A).mul_(pair.scaling)
