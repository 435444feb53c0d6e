"""The two decoders, phi and phi3: packed tokens in, hidden states and losses out.

Parts first: frozen layers with places for adapters, then the decoder layers, then `Decoder`. A
layer is what comes before attention and what comes after it; attention itself is an argument, so
that training (packed sequences) and generation (a cache) run the same layers.

Not here: text, files, sampling, and the arithmetic of the operations (ops.py). This is the plain
version under autograd; training uses the layers of fused_layers.py on the same weights.

Shapes: T packed tokens, D hidden or in, O out, F intermediate, H heads, G key-value heads,
E head_dim, N trained positions, V vocabulary, R rank, X all ranks on a layer, K adapters.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phitune.model import ops
from phitune.model.architecture import (
    FAMILIES,
    LM_HEAD,
    LinearSpec,
    ModelConfig,
    layer_linears,
)
from phitune.model.products import Products
from phitune.model.stores import Store

if TYPE_CHECKING:
    from phitune.model.quantization import Quantization
    from phitune.model.residence import Residence

META = torch.device("meta")

# -------------------------------------------------------------------------------------------------
# Frozen layers that carry weights: linear layers and the embedding, with adapters on them.
#
# A linear layer may be several modules of transformers in one (Phi-2's q, k, v and fc1 read the
# same input): one weight, one GEMM, and the names of its parts kept for files and adapters.


class LoraPair(nn.Module):
    """A and B of one adapted module, and the columns of the fused layer they act on.

    Args:
        lora_A: [R, D], or [R, V] of the embedding.
        lora_B: [len(columns), R].
        key: scalar int64, see `ops.module_key`.
    """

    def __init__(
        self, lora_A: Tensor, lora_B: Tensor, columns: range, scaling: float, key: Tensor
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.columns = columns
        self.scaling = scaling
        self.key = key  # no buffer, as it is made anew and never saved

    def operand(self) -> ops.LoraOperand:
        return ops.LoraOperand(
            self.lora_A,
            self.lora_B,
            self.columns.start,
            self.columns.stop,
            self.scaling,
            self.key,
        )


ALL = slice(None)


class Stretch(NamedTuple):
    """Tokens that follow one another."""

    tokens: slice
    adapter: int | None  # of all of them; None where each has its own


class LoraBank:
    """The adapters of one layer side by side, for inference; see `lora.AdapterSet`.

    Args:
        lora_A: [X, D], or [X, V] of the embedding.
        lora_B: [O, X].
        factors: [K + 1, X], the scaling of each adapter's own columns; the last row, of zeros, is
            the base model's.
        parts: K + 1, the columns of each adapter; none are the base model's.
    """

    def __init__(
        self, lora_A: Tensor, lora_B: Tensor, factors: Tensor, parts: Sequence[slice]
    ) -> None:
        self.lora_A, self.lora_B, self.factors, self.parts = lora_A, lora_B, factors, parts
        self.chosen: Tensor | None = None  # [T, X] or [1, X]; None where all is the base model
        self._stretches: Sequence[Stretch] = ()

    def choose(self, rows: Tensor | None, stretches: Sequence[Stretch]) -> None:
        """
        Args:
            rows: [T] rows of the factors, [1] for all tokens; None for the base model.
            stretches: all T tokens.
        """
        self.chosen = None if rows is None else self.factors[rows]
        self._stretches = stretches

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """Adds the chosen adapters' part to a linear layer's output. out: [T, O], x: [T, D]."""
        if self.chosen is None:
            return out
        for stretch in self._stretches:
            part = ALL if stretch.adapter is None else self.parts[stretch.adapter]
            if part is ALL or part.start < part.stop:
                low = torch.mm(x[stretch.tokens], self.lora_A[part].t())
                low.mul_(self.chosen[stretch.tokens, part])
                out[stretch.tokens].addmm_(low, self.lora_B[:, part].t())
        return out

    def add_to_rows(self, out: Tensor, input_ids: Tensor) -> Tensor:
        """The same for rows of the embedding. out: [T, D], input_ids: [T]."""
        if self.chosen is None:
            return out
        low = nn.functional.embedding(input_ids, self.lora_A.t()).mul_(self.chosen)
        return out.addmm_(low, self.lora_B.t())


class FusedLinear(nn.Module):
    """One or more linear modules that share their input; frozen."""

    def __init__(
        self,
        prefix: str,
        spec: LinearSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_stores: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.device = spec.in_features, device
        self.columns: dict[str, range] = {}  # by full module name
        stop = 0
        for name, out_features in spec.parts:
            self.columns[prefix + name] = range(stop, stop + out_features)
            stop += out_features
        place = META if has_stores else device
        self.weight = _frozen(stop, spec.in_features, dtype=dtype, device=place)
        self.bias = _frozen(stop, dtype=dtype, device=device) if spec.bias else None
        # The weight in fewer bits or elsewhere; `weight` then has shape and type, and no numbers.
        self.store: Store | None = None
        self.low_bits: int | None = None  # of its numbers, where they are multiplied as they are
        self.answering: Products | None = None  # of the store, without gradients
        self.lora = nn.ModuleList()  # of LoraPair, in the order of the columns
        self.bank: LoraBank | None = None  # in their place, for inference
        # (x [T, D], W [O, D], b) -> [T, O], where no pair is attached; see `fused.Gemm`.
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = nn.functional.linear

    def forward(self, x: Tensor, dropout: ops.Dropout | None = None) -> Tensor:
        """x: [T, D]. Returns: [T, O]."""
        if self.answering is not None and not self.lora:
            out = self.answering.forward(x, self.bias)
            return out if self.bank is None else self.bank.add_to(out, x)
        weight = self.weight if self.store is None else self.dense()
        if self.lora:
            loras = [pair.operand() for pair in self.pairs()]
            return ops.lora_linear(x, weight, self.bias, loras, dropout)
        out = self.product(x, weight, self.bias)
        return out if self.bank is None else self.bank.add_to(out, x)

    def pairs(self) -> list[LoraPair]:
        return [pair for pair in self.lora if isinstance(pair, LoraPair)]

    def attach(self, pair: LoraPair) -> None:
        """Puts an adapter on the part with the pair's columns."""
        pairs = [*self.pairs(), pair]
        pairs.sort(key=lambda pair: pair.columns.start)
        self.lora = nn.ModuleList(pairs)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight as they take part; of a store a copy. Returns: [n, D]."""
        weight = self.weight.detach()
        return weight[rows] if self.store is None else self.store.dense(weight.dtype, rows)

    def hold_in(self, store: Store) -> None:
        """Holds the weight in a store from now on, which takes what is loaded from then on."""
        self.store = store
        self.weight = _frozen(*self.weight.shape, dtype=self.weight.dtype, device=META)

    def hold_in_full(self) -> None:
        """Makes room for the weight in full precision, in a decoder whose others get stores."""
        self.weight = _frozen(*self.weight.shape, dtype=self.weight.dtype, device=self.device)

    def hold_expanded(self) -> None:
        """Holds the numbers of its store, where it has one, in full precision from now on."""
        if self.store is not None:
            self.weight = nn.Parameter(self.dense(), requires_grad=False)
            self.store = self.answering = self.low_bits = None

    def widen(self, extra_columns: int) -> Tensor:
        """Puts X extra columns of zeros beside the weight, which becomes a view of the result.

        Returns: [O, D + X]; the weight itself where X is 0.
        """
        if not extra_columns:
            return self.weight.detach()
        rows, width = self.weight.shape
        wide = self.weight.new_zeros(rows, width + extra_columns)
        wide[:, :width] = self.weight.detach()
        self.weight = nn.Parameter(wide[:, :width], requires_grad=False)
        return wide

    def named_weights(self) -> dict[str, Tensor]:
        """Views of the parts, [O, D] and [O] of each, under transformers' names."""
        found = {}
        for name, columns in self.columns.items():
            part = slice(columns.start, columns.stop)
            found[f"{name}.weight"] = self.weight[part]
            if self.bias is not None:
                found[f"{name}.bias"] = self.bias[part]
        return found


class Embedding(nn.Module):
    """The token table; frozen."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = _frozen(vocab_size, hidden_size, dtype=dtype, device=device)
        self.lora: LoraPair | None = None
        self.bank: LoraBank | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: [T]. Returns: [T, D]."""
        if self.bank is not None:
            rows = nn.functional.embedding(input_ids, self.weight)
            return self.bank.add_to_rows(rows, input_ids)
        if self.lora is None:
            return nn.functional.embedding(input_ids, self.weight)
        return ops.lora_embedding(
            input_ids, self.weight, self.lora.lora_A, self.lora.lora_B, self.lora.scaling
        )


class Norm(nn.Module):
    """LayerNorm where there is a bias (phi), RMSNorm where there is none (phi3); frozen."""

    def __init__(
        self, size: int, eps: float, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _frozen(size, dtype=dtype, device=device)
        self.bias = _frozen(size, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D]. Returns: [T, D]."""
        if self.bias is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def named_weights(self, name: str) -> dict[str, Tensor]:
        """Weight and bias, [D] each."""
        found: dict[str, Tensor] = {f"{name}.weight": self.weight}
        if self.bias is not None:
            found[f"{name}.bias"] = self.bias
        return found


def _frozen(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    # Not initialized: every weight is read from a file before it is used.
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


# -------------------------------------------------------------------------------------------------
# Decoder layers.

# (layer index, query [T, H, E], key [T, G, E], value [T, G, E]) -> [T, H, E]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class DecoderLayer(nn.Module):
    """What both families share: norms, fused linear layers, and the two halves of a layer."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_stores: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.prefix = f"model.layers.{index}."
        family = FAMILIES[config.model_type]
        self.norms = nn.ModuleDict(
            {
                name: Norm(
                    config.hidden_size,
                    config.norm_eps,
                    bias=family.norm_bias,
                    dtype=dtype,
                    device=device,
                )
                for name in family.norms
            }
        )
        self.linears = nn.ModuleDict(
            {
                name: FusedLinear(self.prefix, spec, dtype, device, has_stores=has_stores)
                for name, spec in layer_linears(config).items()
            }
        )

    def forward(
        self, x: Tensor, rotary: ops.Rotary, attend: Attend, dropout: ops.Dropout | None
    ) -> Tensor:
        """x: [T, D]. Returns: [T, D]."""
        query, key, value, carried = self.before_attention(x, rotary, dropout)
        return self.after_attention(x, attend(self.index, query, key, value), carried, dropout)

    def before_attention(
        self, x: Tensor, rotary: ops.Rotary, dropout: ops.Dropout | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x: [T, D]. Returns: query [T, H, E], key and value [T, G, E], and what the second half
        needs besides x and attention's output: [T, F] in Phi-2, None in Phi-3.
        """
        raise NotImplementedError

    def after_attention(
        self, x: Tensor, attended: Tensor, carried: Tensor | None, dropout: ops.Dropout | None
    ) -> Tensor:
        """x: [T, D], attended: [T, H, E], carried: of `before_attention`. Returns: [T, D]."""
        raise NotImplementedError

    def _split_heads(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: ops.Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, H E], [T, G E] twice -> [T, H, E], [T, G, E] twice; query and key rotated."""
        head_dim = self.config.head_dim
        query = query.unflatten(-1, (self.config.num_attention_heads, head_dim))
        key = key.unflatten(-1, (self.config.num_key_value_heads, head_dim))
        value = value.unflatten(-1, (self.config.num_key_value_heads, head_dim))
        return ops.rotate(query, rotary), ops.rotate(key, rotary), value

    @property
    def fused_linears(self) -> dict[str, FusedLinear]:
        """Its linear layers by their names here, such as qkv_fc1."""
        found = self.linears.items()
        return {name: linear for name, linear in found if isinstance(linear, FusedLinear)}

    def named_weights(self) -> dict[str, Tensor]:
        """Of norms [D], and of linear layers [O, D] and [O]."""
        found: dict[str, Tensor] = {}
        for name, norm in self.norms.items():
            assert isinstance(norm, Norm)
            found |= norm.named_weights(self.prefix + name)
        for linear in self.fused_linears.values():
            found |= linear.named_weights()
        return found


class PhiLayer(DecoderLayer):
    """Phi-2: attention and MLP side by side on one normed input, both added to it."""

    def before_attention(
        self, x: Tensor, rotary: ops.Rotary, dropout: ops.Dropout | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[T, D] -> [T, H, E], [T, G, E] twice, [T, F]."""
        config = self.config
        sizes = [
            config.query_size,
            config.key_value_size,
            config.key_value_size,
            config.intermediate_size,
        ]
        fused = self.linears["qkv_fc1"](self.norms["input_layernorm"](x), dropout)  # [T, q|k|v|F]
        query, key, value, inner = fused.split(sizes, dim=-1)
        query, key, value = self._split_heads(query, key, value, rotary)
        return query, key, value, inner

    def after_attention(
        self, x: Tensor, attended: Tensor, carried: Tensor | None, dropout: ops.Dropout | None
    ) -> Tensor:
        """[T, D], [T, H, E], [T, F] -> [T, D]."""
        assert carried is not None
        attention: Tensor = self.linears["dense"](attended.flatten(-2), dropout)  # [T, D]
        mlp: Tensor = self.linears["fc2"](ops.gelu(carried), dropout)  # [T, D]
        return attention + mlp + x


class Phi3Layer(DecoderLayer):
    """Phi-3: attention, then a gated MLP, each added to what it read."""

    def before_attention(
        self, x: Tensor, rotary: ops.Rotary, dropout: ops.Dropout | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[T, D] -> [T, H, E], [T, G, E] twice, None."""
        config = self.config
        sizes = [config.query_size, config.key_value_size, config.key_value_size]
        fused = self.linears["qkv_proj"](self.norms["input_layernorm"](x), dropout)  # [T, q|k|v]
        query, key, value = fused.split(sizes, dim=-1)
        query, key, value = self._split_heads(query, key, value, rotary)
        return query, key, value, None

    def after_attention(
        self, x: Tensor, attended: Tensor, carried: Tensor | None, dropout: ops.Dropout | None
    ) -> Tensor:
        """[T, D], [T, H, E], None -> [T, D]."""
        x = x + self.linears["o_proj"](attended.flatten(-2), dropout)
        gate_up = self.linears["gate_up_proj"](self.norms["post_attention_layernorm"](x), dropout)
        mlp: Tensor = self.linears["down_proj"](ops.swiglu(gate_up), dropout)  # [T, D]
        return x + mlp


# -------------------------------------------------------------------------------------------------
# The model.

_LAYERS = {"phi": PhiLayer, "phi3": Phi3Layer}


class Decoder(nn.Module):
    """A frozen Phi model. Its weights are not initialized until `weights.load_weights` has run.

    Args:
        has_stores: the layers' weights get stores; see quantization.py and residence.py.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        has_stores: bool = False,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.quantization: Quantization | None = None  # how the layers' weights are held
        self.residence: Residence | None = None  # where they are, if not on the device
        family = FAMILIES[config.model_type]
        self.config = config
        self.dtype = dtype
        self.device = device
        self.is_mlx = False  # whether MLX computes it; see apple/decoder.py
        self.recompute_layers = 0  # how many layers, from the lowest, autograd recomputes
        self._frequency_table: Tensor | None = None  # [2 or 1, rotary_dim / 2], on the device
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, device)
        self.layers = nn.ModuleList(
            _LAYERS[config.model_type](config, index, dtype, device, has_stores=has_stores)
            for index in range(config.num_hidden_layers)
        )
        self.final_norm = Norm(
            config.hidden_size, config.norm_eps, bias=family.norm_bias, dtype=dtype, device=device
        )
        head = LinearSpec(((LM_HEAD, config.vocab_size),), config.hidden_size, family.lm_head_bias)
        self.lm_head = FusedLinear(
            "", head, dtype, torch.device("meta") if config.tie_word_embeddings else device
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def runs_on(self) -> str:
        """The device, as the user names it."""
        return "mlx" if self.is_mlx else str(self.device)

    def forward(
        self,
        input_ids: Tensor,  # [T]
        position_ids: Tensor,  # [T]
        cu_seqlens: Sequence[int],
        dropout: ops.Dropout | None = None,
    ) -> Tensor:
        """Hidden states of packed sequences, before the final norm. Returns: [T, D]."""

        def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # [T, H, E], [T, G, E] twice -> [T, H, E]
            return ops.attention(query, key, value, cu_seqlens, self.config.sliding_window)

        lengths = [stop - start for start, stop in itertools.pairwise(cu_seqlens)]
        rotary = self.rotary(position_ids, lengths, lengths)
        return self.hidden_states(input_ids, rotary, attend, dropout)

    def hidden_states(
        self,
        input_ids: Tensor,  # [T]
        rotary: ops.Rotary,
        attend: Attend,
        dropout: ops.Dropout | None = None,
    ) -> Tensor:
        """Embedding and layers, with the caller's attention. Returns: [T, D]."""
        x: Tensor = self.embed_tokens(input_ids)
        for index, layer in enumerate(self.layers):
            if index < self.recompute_layers and torch.is_grad_enabled():
                x = _recomputed(layer, x, rotary, attend, dropout)
            else:
                x = layer(x, rotary, attend, dropout)
        return x

    def logits(self, hidden: Tensor, dropout: ops.Dropout | None = None) -> Tensor:
        """Final norm and head. hidden: [N, D]. Returns: [N, V]."""
        logits: Tensor = self.lm_head(self.final_norm(hidden), dropout)
        return logits

    def loss_sum(
        self,
        hidden: Tensor,  # [T, D], from `forward`
        labels: Tensor,  # [T]
        target_positions: Tensor,  # [N], the positions whose next label is trained
        dropout: ops.Dropout | None = None,
    ) -> Tensor:
        """Summed next-token loss over the trained positions; the head runs on no other.

        Returns: scalar.
        """
        row_keys = None if dropout is None else dropout.row_keys[target_positions]

        def loss_of_chunk(hidden: Tensor, targets: Tensor, row_keys: Tensor | None) -> Tensor:
            # [n, D], [n], [n] -> scalar
            chunk_dropout = (
                None if dropout is None or row_keys is None else ops.Dropout(dropout.p, row_keys)
            )
            return ops.cross_entropy_sum(self.logits(hidden, chunk_dropout), targets)

        return ops.chunked_loss_sum(
            hidden[target_positions],
            labels[target_positions + 1],
            row_keys,
            loss_of_chunk,
            self.config.vocab_size,
        )

    def rotary(
        self, position_ids: Tensor, counts: Sequence[int], lengths: Sequence[int]
    ) -> ops.Rotary:
        """Rotary tables for tokens of several sequences.

        Args:
            position_ids: [T], the tokens' positions in their sequences.
            counts: tokens of each sequence among the T.
            lengths: whole length of each sequence, which decides between longrope's factors.

        Returns: cos and sin, [T, rotary_dim] each.
        """
        return self.rotary_at(position_ids, self.inverse_frequencies(counts, lengths))

    def rotary_at(self, position_ids: Tensor, frequencies: Tensor) -> ops.Rotary:
        """`rotary`, of frequencies that are known. position_ids: [T], frequencies: [1 or T, half].

        Returns: cos and sin, [T, rotary_dim] each.
        """
        long_rope = self.config.long_rope
        scale = long_rope.attention_factor if long_rope else 1.0
        angles = position_ids.unsqueeze(1).float() * frequencies  # [T, rotary_dim / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [T, rotary_dim]
        return ops.Rotary(
            (angles.cos() * scale).to(self.dtype), (angles.sin() * scale).to(self.dtype)
        )

    def inverse_frequencies(self, counts: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """What a position is multiplied by; counts and lengths as of `rotary`.

        Returns: [1, rotary_dim / 2] where all sequences have the same, else [T, rotary_dim / 2].
        """
        if self._frequency_table is None:
            self._frequency_table = ops.sent(_frequencies(self.config), self.device)
        long_rope = self.config.long_rope
        if long_rope is None:
            return self._frequency_table
        is_long = [length > long_rope.original_max_position_embeddings for length in lengths]
        if len(set(is_long)) == 1:
            return self._frequency_table[int(is_long[0])].unsqueeze(0)
        choice = torch.tensor(is_long, dtype=torch.long).repeat_interleave(torch.tensor(counts))
        return self._frequency_table[ops.sent(choice, self.device)]

    def fused_linears(self) -> dict[str, FusedLinear]:
        """Every linear layer, the head included, by the full names of the modules it holds."""
        return _linears_in(self)

    def named_weights(self) -> dict[str, Tensor]:
        """Views of all base weights under transformers' names; writing to one fills the model.

        Returns: the embedding [V, D], linear layers [O, D], norms and biases [D] or [O].
        """
        family = FAMILIES[self.config.model_type]
        found: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed_tokens.weight}
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            found |= layer.named_weights()
        found |= self.final_norm.named_weights(family.final_norm)
        if not self.config.tie_word_embeddings:
            found |= self.lm_head.named_weights()
        return found

    def rows_of(self, name: str, every: int = 1) -> Tensor:
        """The numbers of one of `named_weights`, on the CPU: all rows or each `every`-th [n, ...].

        Raises:
            ValueError: there are none, on the meta device.
        """
        module, _, kind = name.rpartition(".")
        # One layer is looked through, and not all of them for each of their weights.
        place: Decoder | DecoderLayer = self
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            if name.startswith(layer.prefix):
                place = layer
        linear = _linears_in(place).get(module)
        if linear is not None and linear.store is not None and kind == "weight":
            columns = linear.columns[module]
            rows = linear.store.some(self.dtype, range(columns.start, columns.stop, every))
        else:
            rows = place.named_weights()[name].detach()[::every]
        if rows.is_meta:
            raise ValueError(f"{name}: this decoder has names and shapes, and no numbers")
        return rows.cpu()

    @property
    def has_numbers(self) -> bool:
        """Whether the weights are here; on the meta device there are only names and shapes."""
        return self.device.type != "meta"


def _linears_in(place: nn.Module) -> dict[str, FusedLinear]:
    found: dict[str, FusedLinear] = {}
    for module in place.modules():
        if isinstance(module, FusedLinear):
            found |= dict.fromkeys(module.columns, module)
    return found


def _frequencies(config: ModelConfig) -> Tensor:
    """[1, rotary_dim / 2]; with longrope [2, rotary_dim / 2], for short and long sequences."""
    exponents = torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim
    powers = config.rope_theta**exponents
    factors = [(1.0,) * len(powers)]
    if config.long_rope is not None:
        factors = [config.long_rope.short_factor, config.long_rope.long_factor]
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers)


def _recomputed(layer: nn.Module, *inputs: Any) -> Tensor:
    """Runs a layer [T, D] -> [T, D] and keeps only its inputs; the backward runs it once more.

    Dropout masks are functions of integers, so no random state has to be saved for that.
    """
    result: Tensor = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result
