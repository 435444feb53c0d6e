"""LoRA adapters: how one starts, PEFT's files in both directions, and several on one model.

Semantics and names are PEFT's, so that an adapter written here loads there and the other way
round: A starts Kaiming-uniform and B at zero (for the embedding A at zero and B normal), updates
count alpha / r times, dropout sits in front of A.

Which modules are adapted is in architecture.py, the arithmetic in ops.py and fused.py. What an
adapter_config.json may say is in adapter_config.py: only plain LoRA is read.

Shapes: R rank, D in, O out, V vocabulary, T tokens, K adapters, X all their ranks on a layer.
"""

import itertools
import math
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from phitune.errors import ModelError, SavedAdapterError, listing
from phitune.model import ops
from phitune.model.adapter_config import (
    CONFIG_FILE,
    PEFT_PREFIX,
    AdapterConfig,
    peft_names,
    read_adapter_config,
)
from phitune.model.architecture import EMBEDDING_MODULE, FAMILIES, LM_HEAD, ModelConfig
from phitune.model.decoder import ALL, Decoder, LoraBank, LoraPair, Stretch
from phitune.model.llama_layout import is_in_parts, joined, parts_of
from phitune.model.tensors import read_header
from phitune.untrusted import write_object

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is, apart from its numbers."""

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]  # full names under transformers' layout, in the model's order
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """The trainable part: one pair of matrices for each adapted module."""

    spec: LoraSpec
    pairs: dict[str, LoraPair]
    num_hidden_layers: int  # of the model it sits on

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self.pairs.values() for parameter in pair.parameters()]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """All matrices, A [R, D] and B [O, R], under PEFT's names."""
        found = {}
        for module, pair in self.pairs.items():
            name_A, name_B = peft_names(module)
            found[name_A], found[name_B] = pair.lora_A.detach(), pair.lora_B.detach()
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites all matrices; names and shapes are those of `tensors()`: [R, D], [O, R]."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


# -------------------------------------------------------------------------------------------------
# On a decoder.


def attach(
    decoder: Decoder, spec: LoraSpec, seed: int, device: torch.device | None = None
) -> Adapter:
    """Puts a new adapter on a decoder, in the place of one that was there.

    Every module draws its first numbers from the seed and its own name: they do not depend on which
    other modules are adapted.

    Args:
        device: where the adapter's matrices are, if not where the decoder is.
    """
    device = device or decoder.device
    linears = decoder.fused_linears()
    dtype = torch.promote_types(decoder.dtype, torch.float32)
    pairs = {}
    for module in spec.modules:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{module}".encode()))
        if module == EMBEDDING_MODULE:
            vocab_size, hidden_size = decoder.embed_tokens.weight.shape
            columns = range(hidden_size)
            lora_A = torch.zeros(spec.rank, vocab_size, dtype=dtype)  # [R, V]
            lora_B = torch.randn(hidden_size, spec.rank, generator=generator, dtype=dtype)  # [D, R]
        else:
            linear = linears[module]
            columns = linear.columns[module]
            # Kaiming-uniform with a = sqrt(5): bounds of 1 / sqrt(fan_in).
            lora_A = torch.rand(spec.rank, linear.in_features, generator=generator, dtype=dtype)
            lora_A = (2 * lora_A - 1) / math.sqrt(linear.in_features)  # [R, D]
            lora_B = torch.zeros(len(columns), spec.rank, dtype=dtype)  # [O, R]
        pairs[module] = LoraPair(
            lora_A.to(device),
            lora_B.to(device),
            columns,
            spec.scaling,
            ops.module_key(seed, module).to(device),
        )
    adapter = Adapter(spec, pairs, decoder.config.num_hidden_layers)
    put_on(decoder, adapter)
    return adapter


def put_on(decoder: Decoder, adapter: Adapter) -> None:
    """Puts an adapter that was made for a decoder on it, in the place of what was there."""
    detach(decoder)
    linears = decoder.fused_linears()
    for module, pair in adapter.pairs.items():
        if module == EMBEDDING_MODULE:
            decoder.embed_tokens.lora = pair
        else:
            linears[module].attach(pair)


def detach(decoder: Decoder) -> None:
    """Takes every adapter off: the decoder is the base model again."""
    decoder.embed_tokens.lora = decoder.embed_tokens.bank = None
    for linear in decoder.fused_linears().values():
        linear.lora, linear.bank = nn.ModuleList(), None


# -------------------------------------------------------------------------------------------------
# PEFT's files.


def save_adapter(adapter: Adapter, folder: Path, base_model_name: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into an existing folder."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.tensors().items()}
    # Not save_file, which makes files that only their owner can read.
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    write_object(folder / CONFIG_FILE, _peft_config(adapter, base_model_name))


def read_adapter(config: ModelConfig, folder: Path) -> Adapter:
    """An adapter on its own, on the CPU, without the weights of its base; see `load_adapter`."""
    names_and_shapes = Decoder(config, torch.float32, "meta")
    return load_adapter(names_and_shapes, folder, device=torch.device("cpu"))


def load_adapter(
    decoder: Decoder, folder: Path, seed: int = 0, device: torch.device | None = None
) -> Adapter:
    """Attaches an adapter that was written here or by PEFT.

    Args:
        device: where the adapter's matrices are, if not where the decoder is.

    Raises:
        ModelError: files missing or damaged, another base, or an unsupported kind of adapter.
    """
    # Both files.
    config = read_adapter_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    tensors = _read_tensors(path)

    # What they hold: one pair of matrices for each module that the model knows.
    known = (EMBEDDING_MODULE, *decoder.fused_linears())
    weights = set(decoder.named_weights())
    copies = {name for name in tensors if _weight_of_base(decoder, name) in weights}
    given = {name: tensor for name, tensor in tensors.items() if name not in copies}
    parts = parts_of(decoder.config)
    in_parts = is_in_parts(parts, given)
    named = [part for name in known for part in (parts.get(name, [name]) if in_parts else [name])]
    in_file = [name for name in named if peft_names(name)[0] in given]
    _check_numbers(path, given, in_file, config.rank)
    problems: list[str] = []
    if in_parts:
        hidden_size = decoder.config.hidden_size
        config, given, problems = joined(parts, config, hidden_size, given)
    modules = tuple(name for name in known if peft_names(name)[0] in given)
    spec = LoraSpec(config.rank, config.alpha, config.dropout, modules, config.use_rslora)

    # Names and shapes, against those of a new adapter of this kind.
    adapter = attach(decoder, spec, seed, device)
    expected = adapter.tensors()
    problems += [f"{name}: missing" for name in expected.keys() - given.keys()]
    problems += _unknown_tensors(given.keys() - expected.keys(), known, decoder.config)
    problems += [
        f"{name}: shape {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    try:
        if problems or not modules:
            base = config.base_model_name
            raise ModelError(
                f"{folder}: this adapter does not fit the model:\n"
                + listing(_by_layer(problems) or ["it holds no LoRA matrices"])
                + (f"\nIt names {base} as its base." if base else "")
                + "\nOpen it with the base model that it was trained on (--model_name)."
            )
        _check_copies(folder, config, decoder, {name: tensors[name] for name in copies})
        _check_selected(folder, config, named, in_file)
    except ModelError:
        detach(decoder)
        raise
    with torch.no_grad():
        adapter.load_tensors(given)
    return adapter


def _check_selected(
    folder: Path, config: AdapterConfig, known: Collection[str], modules: Collection[str]
) -> None:
    """Refuses an adapter whose two files speak of different modules.

    PEFT leaves out matrices that target_modules does not select, and those that are missing.
    """
    selected = config.selected(known)
    problems = [f"{name}: not selected by {CONFIG_FILE}" for name in set(modules) - selected]
    problems += [f"{name}: no matrices in {WEIGHTS_FILE}" for name in selected - set(modules)]
    if problems:
        raise ModelError(
            f"{folder}: target_modules (with exclude_modules and layers_to_transform) in"
            f" {CONFIG_FILE} and the matrices in {WEIGHTS_FILE} contradict each other:\n"
            + listing(_by_layer(problems))
            + "\nGet both files again from where they came from."
        )


def _weight_of_base(decoder: Decoder, name: str) -> str:
    """The name of the base's weight that a tensor of an adapter's file stands for, if it is one.

    PEFT writes the token table and the head beside the matrices if they are adapted or resized, and
    whatever `modules_to_save` names.
    """
    plain = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    if plain == f"{LM_HEAD}.weight" and decoder.config.tie_word_embeddings:
        plain = f"{EMBEDDING_MODULE}.weight"
    return plain


def _check_copies(
    folder: Path, config: AdapterConfig, decoder: Decoder, copies: Mapping[str, Tensor]
) -> None:
    """Refuses an adapter that changes weights of its base, in place of adding matrices to them."""
    weights = decoder.named_weights()
    saved = config.saved({LM_HEAD, *(name.rpartition(".")[0] for name in weights)})
    problems = [f"modules_to_save = {saved}"] if saved else []
    for name, copy in copies.items():
        at = _weight_of_base(decoder, name)
        weight = weights[at]
        if weight.shape != copy.shape:
            problems.append(
                f"{name}: shape {tuple(copy.shape)}, and that of the base is {tuple(weight.shape)}"
            )
        # Without the base's numbers it is too early to tell; it is loaded again with them.
        elif decoder.has_numbers and not _are_equal(decoder.rows_of(at), copy):
            problems.append(f"{name}: other numbers than the base's")
    if problems:
        raise ModelError(
            f"{folder}: this adapter carries whole weights in the place of its base's, such as a"
            " token table of its own after the vocabulary was resized:\n"
            + listing(_by_layer(problems))
            + "\nOnly matrices beside the base's weights can be opened. Merge it with PEFT, and use"
            " the result as a model:\n"
            "  base = AutoModelForCausalLM.from_pretrained(BASE)  # then, if it was resized:"
            " base.resize_token_embeddings(ROWS)\n"
            "  PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
        )


def _are_equal(weight: Tensor, copy: Tensor) -> bool:
    """Whether a copy of a weight has its numbers, as far as its type can hold them. [...]"""
    narrow = copy.dtype if copy.dtype.itemsize < weight.dtype.itemsize else weight.dtype
    return torch.equal(weight.to(narrow), copy.to(weight.device, narrow))


def _read_tensors(path: Path) -> dict[str, Tensor]:  # of any shape, not checked yet
    try:
        if path.exists():
            read_header(path)
        return load_file(path)
    except FileNotFoundError:
        why = ""
        if path.with_suffix(".bin").exists():
            why = "; loading the pickle beside it would run code, save the adapter as safetensors"
        raise ModelError(f"{path}: missing{why}") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged or not a safetensors file: {error}") from None


def _check_numbers(
    path: Path, tensors: dict[str, Tensor], modules: Iterable[str], expected_rank: int
) -> None:
    """Refuses tensors (A should be [R, D]) whose dtype, numbers or rank are wrong."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ModelError(
                f"{path}: {name} is of type {tensor.dtype}, expected fp32, bf16, fp16 or fp64"
            )
        if not tensor.isfinite().all():
            raise ModelError(
                f"{path}: {name} contains NaN or infinity; the run that wrote it went"
                " wrong, train again with half the learning rate"
            )
    for module in modules:
        name = peft_names(module)[0]
        rank = tensors[name].shape[0] if tensors[name].ndim else 0
        if rank != expected_rank:
            raise ModelError(
                f"{path}: {name} has rank {rank}, and {CONFIG_FILE} says r = {expected_rank}; the"
                " two files do not belong together"
            )


def _unknown_tensors(
    names: Iterable[str], known: Collection[str], config: ModelConfig
) -> list[str]:
    """Tensors that the model does not have; of a module that it lacks only the module."""
    foreign = FAMILIES[config.model_type].foreign
    problems: dict[str, None] = {}
    for name in names:
        module, lora, rest = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if module in known and (
            own := re.fullmatch(r"(?:embedding_)?[AB]\.(\w+)(\.weight)?", rest)
        ):
            if own[1] != "weight":
                problems[
                    f"{module}: the adapter's own name, {own[1]}, is in those of its tensors; it is"
                    " a state_dict, save it with PEFT's save_pretrained"
                ] = None
                continue
            if not name.startswith(PEFT_PREFIX):
                problems[f"{module}: its tensors lack PEFT's prefix {PEFT_PREFIX}"] = None
                continue
        if not lora or module in known:
            problems[f"{name}: not in this model"] = None
            continue
        instead = foreign.get(module.rsplit(".", 1)[-1])
        hint = f", its work is done by {instead}" if instead else ""
        problems[f"{module}: not in this model{hint}"] = None
    return list(problems)


def _by_layer(problems: list[str]) -> list[str]:
    """Problems that are the same in several layers in one line, at the lowest of them."""
    layers: dict[tuple[str, str], list[int]] = {}
    for problem in problems:
        parts = re.split(r"(?<=\.layers\.)(\d+)", problem, maxsplit=1)
        before, layer, after = parts if len(parts) == 3 else ("", "0", problem)
        layers.setdefault((before, after), []).append(int(layer))
    lines = []
    for (before, after), of in sorted(layers.items()):
        more = f" (and so in {len(of) - 1} more layers)" if len(of) > 1 else ""
        lines.append(f"{before}{min(of) if before else ''}{after}{more}")
    return lines


def compare_with_memory(adapter: Adapter, folder: Path) -> None:
    """Reads a saved adapter back and compares it with the one in memory, bit for bit.

    Raises:
        SavedAdapterError: it cannot be read, or it is another one.
    """
    try:
        config = read_adapter_config(folder / CONFIG_FILE)
        saved = load((folder / WEIGHTS_FILE).read_bytes())
    except (ModelError, SafetensorError, OSError) as error:
        raise SavedAdapterError(f"{folder}: cannot be read back: {error}") from None
    spec, expected = adapter.spec, adapter.tensors()
    problems = [
        f"{name}: {value!r} in {CONFIG_FILE}, {wanted!r} in memory"
        for name, value, wanted in (
            ("r", config.rank, spec.rank),
            ("lora_alpha", config.alpha, spec.alpha),
            ("use_rslora", config.use_rslora, spec.use_rslora),
        )
        if value != wanted
    ]
    problems += [f"{name}: only in one of the two" for name in expected.keys() ^ saved.keys()]
    problems += [
        f"{name}: differs"
        for name, tensor in expected.items()
        if name in saved and not _same_bits(saved[name], tensor)
    ]
    if problems:
        raise SavedAdapterError(
            f"{folder}: the saved adapter differs from the one in memory:\n"
            f"{listing(sorted(problems))}"
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of any shape are equal to the last bit, on whatever device."""
    one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    return is_alike and one.numpy().tobytes() == other.numpy().tobytes()


def _peft_config(adapter: Adapter, base_model_name: str) -> dict[str, Any]:
    spec = adapter.spec
    in_layers = [name for name in spec.modules if ".layers." in name]
    layers = sorted({int(name.split(".")[2]) for name in in_layers})
    kinds = {name.rsplit(".", 1)[-1] for name in in_layers}
    everywhere = len(layers) in (0, adapter.num_hidden_layers)
    # Short names select the same modules in each layer, and layers_to_transform those in no layer
    # not at all.
    is_short = len(in_layers) == len(kinds) * len(layers) and (
        everywhere or len(in_layers) == len(spec.modules)
    )
    names = sorted({name.rsplit(".", 1)[-1] for name in spec.modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": names if is_short else list(spec.modules),
        "layers_to_transform": layers if is_short and not everywhere else None,
        "layers_pattern": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


# -------------------------------------------------------------------------------------------------
# Several adapters on one frozen decoder, for inference: each token has its own.
#
# All adapters of a linear layer are one pair of matrices, A below A and B beside B. A token's
# factors are zero for the adapters that are not its own, so that a batch that mixes them (and the
# base model, whose factors are all zero) is still two small products a layer:
#
#     out = x W^T + b + (factors * x A^T) B^T
#
# Of a long piece of one sequence, its own adapter's columns alone are computed.

# The tokens of one sequence from which that pays.
_LONG = 32


class AdapterSet:
    """Puts adapters on a decoder side by side, in the place of what was attached there."""

    def __init__(self, decoder: Decoder, adapters: Sequence[Adapter]) -> None:
        detach(decoder)
        self.count = len(adapters)
        # The choice in effect; another object after each change.
        self.chosen: tuple[int, ...] = ()
        self._stretches: list[Stretch] = []
        self._device = decoder.device
        self._banks: list[LoraBank] = []
        for linear in {id(found): found for found in decoder.fused_linears().values()}.values():
            outputs, width = linear.weight.shape
            pairs = [
                (index, adapter.pairs[module])
                for index, adapter in enumerate(adapters)
                for module in linear.columns
                if module in adapter.pairs
            ]
            if not pairs:
                continue
            rank = sum(pair.lora_A.shape[0] for _, pair in pairs)
            like = torch.empty(0, dtype=linear.weight.dtype, device=self._device)
            bank = LoraBank(
                like.new_zeros(rank, width),  # [X, D]
                like.new_zeros(outputs, rank),  # [O, X]
                like.new_zeros(self.count + 1, rank),  # [K + 1, X]
                self._parts([(index, pair.lora_A.shape[0]) for index, pair in pairs]),
            )
            place = 0
            for index, pair in pairs:
                part = slice(place, place + pair.lora_A.shape[0])
                rows = slice(pair.columns.start, pair.columns.stop)
                bank.lora_A[part] = pair.lora_A.detach()
                bank.lora_B[rows, part] = pair.lora_B.detach()
                bank.factors[index, part] = pair.scaling
                place = part.stop
            linear.bank = bank
            self._banks.append(bank)
        self._put_on_embedding(decoder, adapters)

    def choose(self, choice: Sequence[int | None], counts: Sequence[int] | None = None) -> None:
        """Chooses the adapter of each token in the forward passes that follow.

        Args:
            choice: numbers of adapters, None for the base model: of each token, or one for all; of
                each sequence, where there are counts.
            counts: of the tokens of each sequence.
        """
        numbers = [self.count if index is None else index for index in choice]
        of_tokens, stretches = tuple(numbers), [Stretch(ALL, None)]
        if counts is not None:
            both = list(zip(numbers, counts, strict=True))
            of_tokens = tuple(number for number, count in both for _ in range(count))
            stretches = _stretches(both)
        if len(set(of_tokens)) == 1:
            if any(stretch.adapter is not None for stretch in stretches):
                stretches = [Stretch(ALL, of_tokens[0])]
            of_tokens = of_tokens[:1]
        if (of_tokens, stretches) == (self.chosen, self._stretches):
            return
        self.chosen, self._stretches = of_tokens, stretches
        is_base = of_tokens == (self.count,)
        rows = None if is_base else torch.tensor(of_tokens, device=self._device)
        for bank in self._banks:
            bank.choose(rows, stretches)

    def _parts(self, ranks: Sequence[tuple[int, int]]) -> list[slice]:
        """The columns of each adapter, of which some may have several pairs, one after another."""
        widths = [0] * (self.count + 1)
        for index, rank in ranks:
            widths[index] += rank
        stops = itertools.accumulate(widths)
        return [slice(stop - width, stop) for width, stop in zip(widths, stops, strict=True)]

    def _put_on_embedding(self, decoder: Decoder, adapters: Sequence[Adapter]) -> None:
        table = decoder.embed_tokens.weight  # [V, D]
        pairs = [
            (index, adapter.pairs[EMBEDDING_MODULE])
            for index, adapter in enumerate(adapters)
            if EMBEDDING_MODULE in adapter.pairs
        ]
        if not pairs:
            return
        bank = LoraBank(
            torch.cat([pair.lora_A.detach() for _, pair in pairs]).to(table.dtype),
            torch.cat([pair.lora_B.detach() for _, pair in pairs], dim=1).to(table.dtype),
            torch.zeros(
                self.count + 1,
                sum(pair.lora_A.shape[0] for _, pair in pairs),
                dtype=table.dtype,
                device=self._device,
            ),
            self._parts([(index, pair.lora_A.shape[0]) for index, pair in pairs]),
        )
        place = 0
        for index, pair in pairs:
            part = slice(place, place + pair.lora_A.shape[0])
            bank.factors[index, part] = pair.scaling
            place = part.stop
        decoder.embed_tokens.bank = bank
        self._banks.append(bank)


def _stretches(sequences: Sequence[tuple[int, int]]) -> list[Stretch]:
    """Of the adapter and the tokens of each sequence."""
    found: list[Stretch] = []
    start = 0
    for adapter, count in sequences:
        tokens, alone = slice(start, start + count), count >= _LONG
        if found and found[-1].adapter is None and not alone:
            tokens = slice(found.pop().tokens.start, tokens.stop)
        found.append(Stretch(tokens, adapter if alone else None))
        start += count
    return found


@dataclass(frozen=True)
class Adapters:
    """Adapters on the decoder, and which of them answers each of B prompts (None: the base)."""

    on_decoder: AdapterSet
    choice: Sequence[int | None]

    def choose(self, counts: Sequence[int] | None = None) -> None:
        """For the forward passes that follow: of so many tokens of each prompt, or one of each."""
        self.on_decoder.choose(self.choice, counts)
