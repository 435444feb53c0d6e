"""Adapters of a Phi-3 model in Llama's layout, with its projections apart, into those of Phi-3.

Some programs train Phi-3 as a Llama or Mistral model, whose q_proj, k_proj and v_proj are rows of
qkv_proj, and gate_proj and up_proj rows of gate_up_proj. Matrices on the parts are one pair on the
whole, of the sum of their ranks:

    A = [A_q; A_k; A_v]    B = diag(B_q, B_k, B_v)

All pairs of an adapter have one rank here: the others are filled up with zeros.

Shapes: r rank in the file, R rank of the result, D in, O out.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from phitune.model.adapter_config import AdapterConfig, peft_names
from phitune.model.architecture import ModelConfig

Parts = Mapping[str, Mapping[str, range]]  # of each whole module: its parts, and their rows in it


def parts_of(config: ModelConfig) -> dict[str, dict[str, range]]:
    """The modules of a Phi-3 model that Llama's layout has in parts; none of any other model."""
    if config.model_type != "phi3":
        return {}
    query, key_value, inner = config.query_size, config.key_value_size, config.intermediate_size
    sizes = {
        "self_attn.qkv_proj": {"q_proj": query, "k_proj": key_value, "v_proj": key_value},
        "mlp.gate_up_proj": {"gate_proj": inner, "up_proj": inner},
    }
    found: dict[str, dict[str, range]] = {}
    for layer in range(config.num_hidden_layers):
        for whole, parts in sizes.items():
            module, start = f"model.layers.{layer}.{whole}", 0
            found[module] = {}
            for name, rows in parts.items():
                part = f"{module.rpartition('.')[0]}.{name}"
                found[module][part] = range(start, start + rows)
                start += rows
    return found


def is_in_parts(parts: Parts, names: Collection[str]) -> bool:
    """Whether tensors of these names are on parts, and none on a whole."""
    wholes = any(name in names for module in parts for name in peft_names(module))
    return not wholes and any(
        name in names for each in parts.values() for part in each for name in peft_names(part)
    )


def joined(
    parts: Parts, config: AdapterConfig, hidden_size: int, tensors: Mapping[str, Tensor]
) -> tuple[AdapterConfig, dict[str, Tensor], list[str]]:
    """An adapter in parts as one of Phi-3's modules.

    Args:
        tensors: A [r, D] and B [O, r] by PEFT's names, of parts and of other modules.

    Returns: the rank and scale that it has then; its tensors, A [R, D] and B [O, R]; and what is
    missing or of another shape, which is left out.
    """
    found = dict(tensors)
    pieces = [
        len(each)
        for each in parts.values()
        if any(name in tensors for part in each for name in peft_names(part))
    ]
    rank, total = config.rank, config.rank * max(pieces)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith((".lora_A.weight", ".lora_embedding_A")):
            found[name] = _filled(tensor, (total, tensor.shape[1]))
        elif tensor.ndim == 2 and name.endswith((".lora_B.weight", ".lora_embedding_B")):
            found[name] = _filled(tensor, (tensor.shape[0], total))
    problems = []
    for module, each in parts.items():
        rows_of_all = max(rows.stop for rows in each.values())
        whole_A, whole_B = torch.zeros(total, hidden_size), torch.zeros(rows_of_all, total)
        for number, (part, rows) in enumerate(each.items()):
            names = dict(
                zip(peft_names(part), ((rank, hidden_size), (len(rows), rank)), strict=True)
            )
            if not any(name in tensors for name in names):
                continue
            wrong = [name for name, shape in names.items() if _shape(tensors.get(name)) != shape]
            problems += [
                f"{name}: shape {_shape(tensors.get(name)) or 'missing'}, expected {names[name]}"
                for name in wrong
            ]
            for name in names:
                found.pop(name, None)
            if not wrong:
                name_A, name_B = names
                place = slice(number * rank, (number + 1) * rank)
                whole_A[place] = tensors[name_A]
                whole_B[rows.start : rows.stop, place] = tensors[name_B]
                found |= dict(zip(peft_names(module), (whole_A, whole_B), strict=True))
    # The same scale at the larger rank.
    more = math.sqrt(max(pieces)) if config.use_rslora else max(pieces)
    return replace(config, rank=total, alpha=config.alpha * more), found, problems


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _filled(tensor: Tensor, shape: tuple[int, int]) -> Tensor:  # [r, D] to [R, D], [O, r] to [O, R]
    if tensor.shape[0] > shape[0] or tensor.shape[1] > shape[1]:
        return tensor
    filled = tensor.new_zeros(shape)
    filled[: tensor.shape[0], : tensor.shape[1]] = tensor
    return filled
