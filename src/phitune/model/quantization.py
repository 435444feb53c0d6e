"""A base held in fewer bits: how it is loaded, and held against full precision meanwhile.

int8 weights are multiplied as they are, by activations of 8 bits. An input that is many times as
large as the others would leave nothing of them when a token is rounded. So while the weights are
read, layer after layer, rows of the user's own data pass through in full precision: inputs that
stick out are kept, their weights too (`Int8Rows.columns`), and each linear layer's product and its
way back are compared. One that is further off than `MOST_OFF` is multiplied exactly instead.

What was found belongs to the run: the same columns make the same numbers again.

Shapes: T tokens, D in, O out, n rows.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phitune.errors import ModelError, SettingsError
from phitune.model import ops
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import META, Decoder, DecoderLayer, FusedLinear
from phitune.model.device import MLX, torch_device
from phitune.model.fused import Packed
from phitune.model.gemm import STANDARD
from phitune.model.product_choice import choose_bits, low_products_of_store
from phitune.model.products import Products as LayerProducts
from phitune.model.products import Scratch
from phitune.model.scheme import Scheme
from phitune.model.stores import CPU, NF4_BLOCK, Store, new_store
from phitune.model.tensors import Weight
from phitune.model.weights import checked_weights, load_weights, read_linear, weights_in

Kind = Literal["int8", "nf4", "int4"]
AskedQuantization = Literal["trained", "none", "int8", "nf4", "int4"]
Products = Literal["auto", "exact", "low"]
QUANTIZATION_FILE = "quantization.json"  # beside an adapter: the base that it was trained on

# Kept at most of a linear layer's inputs: those whose largest number is TIMES the median.
MOST_COLUMNS, TIMES = 16, 8.0
# A product may be off by this share of its length; whole numbers of 7 bits make 1.7 to 3.6 %.
MOST_OFF = 0.05
CALIBRATION_TOKENS = 512  # that pass through
CHECKED_TOKENS = 64  # of those, whose products are compared


@dataclass(frozen=True)
class Quantization:
    """How the frozen layers are held and multiplied."""

    kind: Kind
    low: bool  # whether numbers of few bits are multiplied, in place of full ones
    bits: int = 8  # of int8's numbers
    columns: Mapping[str, Sequence[int]] = field(default_factory=dict)  # kept, by linear layer
    exact: Sequence[str] = ()  # linear layers that are multiplied exactly all the same
    origin: str = ""  # for people, of a folder that was quantised already: what is made of it
    in_full: Sequence[str] = ()  # linear layers that such a folder has in full precision

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def in_words(self) -> str:
        """For the user."""
        how = f"{self.kind} {self.origin}".rstrip()
        if self.kind == "int8" and self.bits != 8:
            how += f" ({self.bits} of 8 bits are used)"
        if self.in_full:
            how += f", but for {len(self.in_full)} linear layers that it has in full"
        if not self.low:
            return f"{how}, expanded for each product"
        kept = sum(len(columns) for columns in self.columns.values())
        how += ", multiplied by activations of 8 bits"
        how += f"; {kept} input columns kept in full" if kept else ""
        if self.exact:
            how += f"; multiplied exactly, as they were off: {', '.join(self.exact)}"
        return how


def quantization_from_json(content: Mapping[str, Any]) -> Quantization:
    """What `Quantization.as_json` wrote.

    Raises:
        ModelError: it is not that.
    """
    try:
        columns = {str(name): [int(c) for c in found] for name, found in content["columns"].items()}
        kind, bits = content["kind"], int(content["bits"])
        if kind not in ("int8", "nf4", "int4") or bits not in (7, 8):
            raise ValueError(f"kind {kind!r} with {bits} bits")
        exact = [str(name) for name in content["exact"]]
        origin = str(content.get("origin", ""))
        in_full = tuple(str(name) for name in content.get("in_full", ()))
        return Quantization(kind, bool(content["low"]), bits, columns, exact, origin, in_full)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"not the record of a quantised base: {error}") from None


def choose_for_folder(
    scheme: Scheme | None, asked: Kind | Literal["none"], products: Products, device_name: str
) -> tuple[Quantization | None, str]:
    """How the base of a model folder is held, and why: as asked, or as its files have it already.

    Returns: None for full precision, into which files of other schemes are expanded.

    Raises:
        SettingsError: the device has no such weights or products.
    """
    if asked == "none" and products == "low" and (scheme is None or scheme.kind is None):
        raise SettingsError("products low: the base is in full; add --quantization int8 or nf4")
    if scheme is None:
        if asked == "none":
            return None, "as asked"
        return choose_quantization(asked, products, device_name)
    if asked != "none" and (asked != scheme.kind or device_name == MLX):
        chosen, why = choose_quantization(asked, products, device_name)
        return replace(chosen, origin=f"made again of {scheme.name}"), why
    if scheme.kind is None:
        return None, f"{scheme.name} is expanded while it is loaded"
    if device_name == MLX:
        return None, f"{scheme.name} is expanded: MLX holds fewer bits in a way of its own"
    chosen, why = choose_quantization(scheme.kind, products, device_name)
    if scheme.kind == "int8" and chosen.low and chosen.bits < 8:
        why = "its numbers have 8 bits, and this processor multiplies 7 without an error"
        if products == "low":
            raise SettingsError(f"products low: {why}; leave --products out")
        chosen = Quantization(scheme.kind, low=False)
    return replace(chosen, origin=f"as the folder has it ({scheme.name})"), why


def choose_quantization(
    kind: Kind, products: Products, device_name: str
) -> tuple[Quantization, str]:
    """How a base is held on a device, before its weights are looked at; and why.

    Raises:
        SettingsError: the device has no such weights or products.
    """
    if device_name == MLX:
        if kind == "nf4":
            raise SettingsError(
                "quantization nf4: MLX has none; use --quantization int4 or int8, its own kinds"
            )
        if products == "low":
            raise SettingsError("products low: MLX has none; leave --products out")
        return Quantization(kind, low=False), "MLX multiplies what it holds, in groups of 64"
    if kind == "int4":
        raise SettingsError(
            "quantization int4: it is MLX's; use --quantization nf4, which is as small and closer"
        )
    device = torch_device(device_name)
    if products == "exact" or (products == "auto" and kind == "nf4"):
        why = "as asked" if products == "exact" else "nf4's own error is larger than any other"
        return Quantization(kind, low=False), why
    bits, why = choose_bits(device)
    if bits is not None:
        return Quantization(kind, low=True, bits=bits), why
    if products == "low":
        raise SettingsError(f"products low: {why}; use --products exact")
    return Quantization(kind, low=False), why


def as_held_on(
    quantization: Quantization, device_name: str
) -> tuple[Quantization | None, list[str]]:
    """How a base that was held so in training is held on this device.

    Returns: None for full precision; and a warning where the numbers are others.
    """
    kind = quantization.kind
    if (kind == "int4") != (device_name == MLX) and kind != "int8":
        return None, [f"the base was trained in {kind}, which {device_name} has not; it is in full"]
    try:
        here, why = choose_quantization(kind, "low" if quantization.low else "exact", device_name)
    except SettingsError:
        exact = replace(quantization, low=False)
        return exact, [f"products are exact here, in training they were not ({kind})"]
    if quantization.low and here.bits < quantization.bits:
        exact = replace(quantization, low=False)
        return exact, [f"products are exact here, in training they were not ({why})"]
    return quantization, []


def load_quantized(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization,
    rows: Packed | None = None,
) -> Decoder:
    """The decoder of a model folder, its layers held in fewer bits.

    At its peak loading holds the decoder and a piece of a weight; with `rows` a layer in full.

    Args:
        quantization: of `choose_quantization`, or of a run, whose columns are kept again.
        rows: looked for columns to keep; None where they are known, or none is wanted.

    Returns: the decoder, whose `quantization` says what was found.

    Raises:
        ModelError: files missing or damaged, or layers that cannot be held so.
    """
    weights = weights_in(folder, Decoder(config, dtype, META))
    decoder = Decoder(config, dtype, device, has_stores=True)
    left_in_full = _left_in_full(decoder, weights, quantization.kind)
    for linear in left_in_full.values():
        linear.hold_in_full()
    quantization = replace(quantization, in_full=tuple(left_in_full))
    if rows is not None and quantization.low and quantization.kind == "int8":
        quantization = _load_calibrated(decoder, folder, quantization, rows)
    else:
        for name, linear in _linears(decoder):
            if linear.weight.is_meta:
                linear.hold_in(_store(quantization, name, linear))
        load_weights(decoder, folder)
    for name, linear in _linears(decoder):
        linear.low_bits = quantization.bits if quantization.low else None
        if name in quantization.exact:
            linear.low_bits = None
    decoder.quantization = quantization
    return decoder


def _left_in_full(
    decoder: Decoder, weights: Mapping[str, Weight], kind: Kind
) -> dict[str, FusedLinear]:
    """Layers that a folder leaves in full, wholly or in a part, where it has others in this kind.

    Such folders spare the layers that fewer bits would harm most.
    """
    linears = _linears(decoder)
    full = {
        name: linear
        for name, linear in linears
        if any(weights[f"{module}.weight"].kind != kind for module in linear.columns)
    }
    return full if len(full) < len(linears) else {}


def _linears(decoder: Decoder) -> list[tuple[str, FusedLinear]]:
    """The linear layers of all decoder layers, by names such as model.layers.0.qkv_fc1."""
    found = []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        found += _linears_of(layer)
    return found


def _linears_of(layer: DecoderLayer) -> list[tuple[str, FusedLinear]]:
    return [(layer.prefix + name, linear) for name, linear in layer.fused_linears.items()]


def _store(quantization: Quantization, name: str, linear: FusedLinear) -> Store:
    assert quantization.kind != "int4"  # Which is MLX's.
    rows, width = linear.weight.shape
    columns = quantization.columns.get(name, ())
    try:
        return new_store(
            quantization.kind, (rows, width), linear.device, quantization.bits, columns
        )
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None


class _HeldWeight(Weight):
    """A weight as the numbers that a base in fewer bits has of it.

    Args:
        whole: [O, D] of a file, in full.
        columns: that a store keeps in full.
    """

    def __init__(self, whole: Weight, quantization: Quantization, columns: Sequence[int]) -> None:
        self.shape, self.whole, self.held, self.columns = whole.shape, whole, quantization, columns

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns: [n, D] in fp32."""
        # Blocks of numbers begin where rows do whose number is that of a block's.
        first = start - start % NF4_BLOCK
        last = min(stop + -stop % NF4_BLOCK, self.shape[0])
        assert self.held.kind != "int4"
        shape = (last - first, self.shape[1])
        store = new_store(self.held.kind, shape, CPU, self.held.bits, self.columns)
        store.put(0, self.whole.rows(first, last))
        return store.dense(torch.float32, slice(start - first, stop - first))


def held_weights(
    weights: Mapping[str, Weight], decoder: Decoder, quantization: Quantization
) -> dict[str, Weight]:
    """The weights of a folder as `load_quantized` holds them, one at a time and expanded again.

    Args:
        decoder: whose weights they are; it may be without numbers.

    Raises:
        SettingsError: they were held as only MLX does.
    """
    if quantization.kind == "int4":
        raise SettingsError(
            "merge_into trained: the base was in int4, whose numbers MLX alone has; leave it out"
        )
    found = dict(weights)
    for name, linear in _linears(decoder):
        if name in quantization.in_full:
            continue
        for module in linear.columns:
            whole = weights[f"{module}.weight"]
            if whole.kind != quantization.kind:  # Else the file has these numbers.
                columns = quantization.columns.get(name, ())
                found[f"{module}.weight"] = _HeldWeight(whole, quantization, columns)
    return found


# -------------------------------------------------------------------------------------------------
# Rows of data that pass through while the weights are read.


class _Recorder:
    """The product of a linear layer in full precision, which remembers its input."""

    def __init__(self) -> None:
        self.x = torch.empty(0)  # [T, D]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, D], weight: [O, D], bias: [O]. Returns: [T, O]."""
        self.x = x
        return F.linear(x, weight, bias)


@torch.no_grad()
def _load_calibrated(
    decoder: Decoder, folder: Path, quantization: Quantization, rows: Packed
) -> Quantization:
    """Loads a decoder whose layers are without weights; see `load_quantized`."""
    weights = checked_weights(decoder, folder)
    in_full = {linear for _, linear in _linears(decoder) if not linear.weight.is_meta}
    load_weights(decoder, folder, without_layers=True)
    lengths = [stop - start for start, stop in itertools.pairwise(rows.cu_seqlens)]
    rotary = decoder.rotary(rows.position_ids, lengths, lengths)
    window = decoder.config.sliding_window

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # [T, H, E], [T, G, E] twice -> [T, H, E]
        return ops.attention(query, key, value, rows.cu_seqlens, window)

    columns: dict[str, Sequence[int]] = {}
    exact = []
    x = decoder.embed_tokens(rows.input_ids)  # [T, D]
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        recorders = {}
        for name, linear in _linears_of(layer):
            whole = read_linear(weights, linear)
            linear.weight = nn.Parameter(whole, requires_grad=False)
            linear.product = recorders[name] = _Recorder()
        x = layer(x, rotary, attend, None)
        for name, linear in _linears_of(layer):
            if linear in in_full:
                linear.product = F.linear
                continue
            seen = recorders[name].x
            if found := outlier_columns(seen):
                columns[name] = found
            store = _store(replace(quantization, columns=columns), name, linear)
            for module, part in linear.columns.items():
                weights[f"{module}.weight"].put_into(store, part.start)
            some = seen[:: max(1, len(seen) // CHECKED_TOKENS)]
            bits = quantization.bits
            low = low_products_of_store(store, linear.weight, 0, bits, STANDARD, Scratch())
            if how_far_off(low, some, linear.weight) > MOST_OFF:
                exact.append(name)
            linear.hold_in(store)
            linear.product = F.linear
    return replace(quantization, columns=columns, exact=exact)


def outlier_columns(x: Tensor) -> list[int]:
    """The inputs whose largest number sticks out among those of all inputs. x: [T, D]."""
    largest = x.abs().amax(0).float()  # [D]
    above = largest > TIMES * largest.median()
    number = min(int(above.sum()), MOST_COLUMNS)
    return sorted(largest.topk(number).indices.tolist())


def how_far_off(products: LayerProducts, x: Tensor, weight: Tensor) -> float:
    """The larger error of a product and of its way back, as shares of their lengths.

    Args:
        x: [T, D], what the linear layer reads.
        weight: [O, D], in full precision.
    """
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(len(x), len(weight), generator=generator).to(x)  # [T, O]
    errors = []
    for ours, theirs in (
        (products.forward(x, None), F.linear(x, weight)),
        (products.backward(grad), torch.mm(grad, weight)),
    ):
        apart = (ours.float() - theirs.float()).norm()
        errors.append(float(apart / theirs.float().norm().clamp(min=1e-30)))
    return max(errors)
