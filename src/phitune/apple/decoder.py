"""A frozen Phi model whose weights are MLX's, in the place of torch's `Decoder`.

Names, shapes and the places of adapters are those of `Decoder`, which it is without memory; so
files, adapters and answers treat it alike. What it computes comes in and goes out as torch's
tensors on the CPU.

Shapes: T packed tokens, N rows, D hidden, V vocabulary, O out.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import torch
from torch import Tensor

from phitune.apple import memory
from phitune.apple.arrays import DTYPES, to_mlx, to_torch
from phitune.apple.layers import LAYERS, MlxLayer, Norm, Shared
from phitune.apple.linear import (
    AdaptedLinear,
    AnsweringAdapters,
    FrozenLinear,
    QuantizedLinear,
    TrainedPairs,
)
from phitune.model import decoder as plain
from phitune.model import ops
from phitune.model.architecture import EMBEDDING_MODULE, FAMILIES, ModelConfig
from phitune.model.decoder import Attend, Decoder, DecoderLayer, FusedLinear
from phitune.model.tensors import Weight
from phitune.model.weights import checked_weights, pieces_of


class MlxDecoder(Decoder):
    """`Decoder`, computed by MLX. It has no numbers until `load` has run.

    Args:
        bits: 4 or 8, the bits of a weight in the layers, by MLX's own `quantize`; None for
            `dtype`. The token table and the head stay as they are.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, bits: int | None = None
    ) -> None:
        super().__init__(config, dtype, "meta")
        self.bits = bits
        self.is_mlx = True
        self.device = torch.device("cpu")  # of adapters, and of what comes in and goes out
        self.dropout_rate = 0.0  # of adapters in training
        self.table: FrozenLinear  # [V, D], of which rows are taken
        self.stack: list[MlxLayer] = []
        self.norm: Norm
        self.head: AdaptedLinear
        # Where each module's numbers are, by its full name.
        self._places: dict[str, tuple[FrozenLinear | Norm, slice]] = {}

    def load(self, folder: Path) -> None:
        """Reads the weights; the largest linear layer is there twice meanwhile.

        Raises:
            ModelError: files missing or damaged, or tensors that do not fit the configuration.
        """
        weights = checked_weights(self, folder)
        family, config = FAMILIES[self.config.model_type], self.config
        rows = {f"{EMBEDDING_MODULE}.weight": self.embed_tokens.weight}
        self.table = FrozenLinear(self._read(weights, rows), None)
        self._places[EMBEDDING_MODULE] = (self.table, slice(None))
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            norms = {
                name: self._read_norm(weights, layer.prefix + name, norm)
                for name, norm in layer.norms.items()
                if isinstance(norm, plain.Norm)
            }
            linears = {
                name: self._read_linear(weights, linear)
                for name, linear in layer.linears.items()
                if isinstance(linear, FusedLinear)
            }
            self.stack.append(LAYERS[config.model_type](config, norms, linears))
        self.norm = self._read_norm(weights, family.final_norm, self.final_norm)
        tied = config.tie_word_embeddings
        self.head = AdaptedLinear(self.table if tied else self._read_linear(weights, self.lm_head))

    def _read(self, weights: Mapping[str, Weight], parts: Mapping[str, Tensor]) -> mx.array:
        """Tensors [n, ...] below each other, those of one fused layer. Returns: [O, ...]."""
        rows = sum(len(part) for part in parts.values())
        shape = next(iter(parts.values())).shape[1:]
        whole = torch.empty((rows, *shape), dtype=self.dtype)
        start = 0
        for name, part in parts.items():
            for first, piece in pieces_of(weights[name], part):
                whole[start + first : start + first + len(piece)].copy_(piece)
            start += len(part)
        array = to_mlx(whole)
        mx.eval(array)
        return array

    def _read_norm(self, weights: Mapping[str, Weight], name: str, norm: plain.Norm) -> Norm:
        arrays = [
            self._read(weights, {key: part}) for key, part in norm.named_weights(name).items()
        ]
        read = Norm(arrays[0], arrays[1] if len(arrays) > 1 else None, norm.eps)
        self._places[name] = (read, slice(None))
        return read

    def _read_linear(self, weights: Mapping[str, Weight], linear: FusedLinear) -> FrozenLinear:
        named = linear.named_weights()
        parts = {name: part for name, part in named.items() if name.endswith(".weight")}
        biases = {name: part for name, part in named.items() if name.endswith(".bias")}
        bias = self._read(weights, biases) if biases else None
        weight = self._read(weights, parts)
        frozen = FrozenLinear(weight, bias)
        if self.bits and linear is not self.lm_head:
            frozen = QuantizedLinear(weight, bias, self.bits)
            mx.eval(frozen.arrays)  # The weight is gone before the next is read.
        for module, columns in linear.columns.items():
            self._places[module] = (frozen, slice(columns.start, columns.stop))
        return frozen

    def rows_of(self, name: str, every: int = 1) -> Tensor:
        """The numbers of one of `named_weights`: every row, or each `every`-th [n, ...]."""
        module, _, kind = name.rpartition(".")
        place, rows = self._places[module]
        whole = place.bias if kind == "bias" else place.dense()
        assert whole is not None
        return to_torch(whole[rows][::every])

    @property
    def has_numbers(self) -> bool:
        return bool(self._places)

    # ---------------------------------------------------------------------------------------------
    # What is beside the weights: what torch's modules have attached to them.

    def adapted(self) -> list[tuple[AdaptedLinear, FusedLinear]]:
        """Every linear layer that is computed, with the module that adapters are attached to."""
        pairs = [(self.head, self.lm_head)]
        for computed, layer in zip(self.stack, self.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            for name, linear in layer.linears.items():
                assert isinstance(linear, FusedLinear)
                pairs.append((computed.linears[name], linear))
        return pairs

    def take_adapters(self) -> None:
        """Computes with the adapters that are attached or chosen now, as their numbers are now."""
        for computed, linear in self.adapted():
            beside = computed.beside
            if linear.bank is not None:
                if not (isinstance(beside, AnsweringAdapters) and beside.bank is linear.bank):
                    computed.beside = AnsweringAdapters(linear.bank)
            elif not linear.lora:
                computed.beside = None
            elif isinstance(beside, TrainedPairs) and beside.is_of(
                linear.pairs(), self.dropout_rate
            ):
                beside.mirror()
            else:
                outputs, dtype = linear.weight.shape[0], DTYPES[self.dtype]
                computed.beside = TrainedPairs(linear.pairs(), outputs, dtype, self.dropout_rate)

    # ---------------------------------------------------------------------------------------------
    # What it computes.

    def embed(self, input_ids: Tensor) -> mx.array:
        """Rows of the token table, without what an adapter adds. input_ids: [T]. Returns: [T, D]"""
        return self.table.weight[to_mlx(input_ids)]

    def embed_adapted(self, input_ids: Tensor) -> mx.array:
        """Rows of the token table, with it. input_ids: [T]. Returns: [T, D]."""
        x = self.embed(input_ids)
        update = self.embedding_update(input_ids)
        return x if update is None else x + to_mlx(update)

    def embedding_update(self, input_ids: Tensor) -> Tensor | None:
        """What the adapter on the token table adds, by torch. input_ids: [T]. Returns: [T, D]."""
        embedding = self.embed_tokens
        if embedding.bank is not None:
            zeros = torch.zeros(len(input_ids), self.config.hidden_size, dtype=self.dtype)
            return embedding.bank.add_to_rows(zeros, input_ids)
        if (lora := embedding.lora) is None:
            return None
        none = torch.zeros(self.config.vocab_size, 1, dtype=self.dtype).expand(
            -1, self.config.hidden_size
        )
        return ops.lora_embedding(input_ids, none, lora.lora_A, lora.lora_B, lora.scaling)

    def shared(
        self,
        position_ids: Tensor,  # [T]
        cu_seqlens: Sequence[int],
        row_keys: Tensor | None = None,  # [T] int32
    ) -> Shared:
        """What all layers have in common; tokens behind the last sequence are padding."""
        lengths = [stop - start for start, stop in itertools.pairwise(cu_seqlens)]
        padding = len(position_ids) - cu_seqlens[-1]
        counts = [*lengths, padding] if padding else lengths
        rotary = self.rotary(position_ids, counts, counts)  # [T, rotary_dim]
        return Shared(
            *self.tables(rotary),
            tuple(cu_seqlens),
            None if row_keys is None else to_mlx(row_keys).view(mx.uint32),
        )

    def tables(self, rotary: ops.Rotary) -> tuple[mx.array, mx.array]:
        """Cosines and sines [T, rotary_dim / 2], of which torch's have both halves."""
        half = rotary.cos.shape[-1] // 2
        return to_mlx(rotary.cos[:, :half]), to_mlx(rotary.sin[:, :half])

    def forward(
        self,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Sequence[int],
        dropout: ops.Dropout | None = None,
    ) -> Tensor:
        """Hidden states of packed sequences, before the final norm. Returns: [T, D].

        For answers and their losses: what is trained goes through the engine.

        Raises:
            MemoryError: it took more than MLX may.
        """
        assert dropout is None
        memory.begin_watching()
        self.take_adapters()
        shared = self.shared(position_ids, cu_seqlens)
        x = self.embed_adapted(input_ids)
        for layer in self.stack:
            x, _ = layer.forward(x, shared)
            mx.eval(x)
            memory.check_limit()
        return to_torch(x)

    def logits(self, hidden: Tensor, dropout: ops.Dropout | None = None) -> Tensor:
        """Final norm and head. hidden: [N, D]. Returns: [N, V]."""
        assert dropout is None
        self.take_adapters()
        memory.begin_watching()
        logits = to_torch(self.head_of(to_mlx(hidden)))
        memory.check_limit()
        return logits

    def head_of(self, hidden: mx.array) -> mx.array:
        """hidden: [N, D]. Returns: logits [N, V]."""
        normed = self.norm(hidden)
        return self.head.forward(normed, self.head.low(normed, None))

    def hidden_states(
        self,
        input_ids: Tensor,  # [T]
        rotary: ops.Rotary,
        attend: Attend,
        dropout: ops.Dropout | None = None,
    ) -> Tensor:  # [T, D]
        """
        Raises:
            TypeError: torch's attention cannot be part of what MLX computes; see `cache.py`.
        """
        raise TypeError("MLX's decoder attends by itself")


def load_mlx_decoder(
    folder: Path, config: ModelConfig, dtype: torch.dtype, bits: int | None = None
) -> MlxDecoder:
    """Builds the decoder of a model folder; see `weights.load_decoder` and `MlxDecoder`."""
    decoder = MlxDecoder(config, dtype, bits)
    decoder.load(folder)
    return decoder
