"""The Triton kernels compiled for GPUs that are not here: what each takes of a card.

    python benchmarks/gpu_kernels.py

Every kernel of the fused engine, at the widths of Phi-2 and Phi-3.5 in bf16, and those of a base in
fewer bits (of Phi-2's widest layer, for batches and for answers) are compiled for compute
capabilities 8.0 to 12.0 by the compiler and the assembler (ptxas) that Triton brings. That tells
registers a thread, bytes that do not fit in them and are spilled, shared memory and machine
instructions. Nothing runs, nothing is timed. Writes results/gpu_kernels.json and .md.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from machine import save
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from phitune.model import ops, triton_backend, triton_products
from phitune.model.architecture import (
    FAMILIES,
    ModelConfig,
    extra_columns,
    known_model_config,
    layer_linears,
)
from phitune.model.attention import InBlocks
from phitune.model.decoder import Norm
from phitune.model.fused import Backend, Before, FusedNorm, Kernels
from phitune.model.gemm import STANDARD
from phitune.model.products import Scratch
from phitune.model.stores import Int8Rows, Nf4

CAPABILITIES = (80, 86, 89, 90, 120)
RANKS = (8, 64)
PARTS = ("layers", "products")
PRODUCTS = "Phi-2 in fewer bits"
TOKENS = 4096
ROWS_OF_LOGITS = 1024
DROPOUT = 0.05


def models() -> dict[str, ModelConfig]:
    found = {}
    for name, hub in (("Phi-2", "phi-2"), ("Phi-3.5", "Phi-3.5-mini-instruct")):
        config = known_model_config(f"microsoft/{hub}")
        assert config is not None
        found[name] = config
    return found


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was started with."""

    what: str
    kernel: Any
    grid: tuple[int, ...]
    values: tuple[object, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Built:
    """What a compiled kernel takes. Bytes that are spilled are those stored and loaded again."""

    model: str
    rank: int
    kernel: str
    capability: int
    programs: int
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int | None  # None where they are not counted


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def adapters(width: int, ranks: int, pairs: int) -> triton_backend.Adapters:
    """Pairs of one linear layer, whose ranks add up to `ranks`."""
    columns = extra_columns(ranks)
    return triton_backend.Adapters(
        empty(columns, width),
        empty(columns),
        empty(columns, dtype=torch.int32),
        empty(pairs, width, dtype=torch.int32),
        ops.keep_threshold(DROPOUT),
    )


def launches_of_model(config: ModelConfig, rank: int) -> list[Launch]:
    """Every kernel of a layer and of the loss, once."""
    found: list[Launch] = []
    what = ""

    def record(kernel: Any, grid: tuple[int, ...], *values: object, **constants: Any) -> None:
        of_layer = kernel.__name__ in ("widen", "complete")
        name = f"{kernel.__name__}, {what}" if of_layer else kernel.__name__
        if name not in {launch.what for launch in found}:
            found.append(Launch(name, kernel, grid, values, constants))

    usual, triton_backend.launch = triton_backend.launch, record
    keys = empty(TOKENS, dtype=torch.int32)
    has_bias = FAMILIES[config.model_type].norm_bias
    hidden = config.hidden_size
    frozen = Norm(hidden, 1e-5, bias=has_bias, dtype=torch.bfloat16, device=torch.device("meta"))
    norm = FusedNorm(frozen, Backend(STANDARD, InBlocks(), Kernels(), Scratch()))
    activation: Before = "gelu" if config.model_type == "phi" else "swiglu"
    reads: dict[str, Before] = {
        "dense": None,
        "o_proj": None,
        "fc2": activation,
        "down_proj": activation,
    }
    for name, spec in layer_linears(config).items():
        before = reads.get(name, norm)
        what = name
        own = adapters(spec.in_features, rank * len(spec.parts), len(spec.parts))
        inputs = spec.in_features * (2 if before == "swiglu" else 1)
        x = empty(TOKENS, inputs)
        wide, _, stats = triton_backend.widen(x, before, own, keys)
        out = empty(TOKENS, inputs) if before == activation else wide[:, : spec.in_features]
        grad_A = empty(own.columns, spec.in_features, dtype=torch.float32)
        triton_backend.complete(x, before, wide, out, own, grad_A, keys, stats)
        if stats is not None:
            triton_backend.norm_backward(out, x, norm, stats, x, adds=True)
    heads = config.num_attention_heads + config.num_key_value_heads
    table = empty(TOKENS, config.rotary_dim)
    x = empty(TOKENS, heads, config.head_dim)
    triton_backend.rotate_(x, ops.Rotary(table, table))
    logits = empty(ROWS_OF_LOGITS, config.vocab_size)
    triton_backend.cross_entropy_(logits, empty(ROWS_OF_LOGITS, dtype=torch.int64), 1.0)
    triton_backend.launch = usual
    return found


def launches_of_products(rank: int) -> list[Launch]:
    """The kernels of a base in fewer bits: of the widest layer, with as many tokens as matter."""
    found: list[Launch] = []
    what = ""

    def record(kernel: Any, grid: tuple[int, ...], *values: object, **constants: Any) -> None:
        found.append(Launch(f"{kernel.__name__}{what}", kernel, grid, values, constants))

    usual, triton_backend.launch = triton_backend.launch, record
    spec = layer_linears(models()["Phi-2"])["qkv_fc1"]
    width, outputs = spec.in_features, sum(part for _, part in spec.parts)
    extra = extra_columns(rank * len(spec.parts))
    wide, further = empty(TOKENS, width + extra), empty(outputs, extra)
    triton_products.rounded_rows(wide[:, :width])
    numbers = empty(outputs, width, dtype=torch.int8)
    for tokens in (TOKENS, 64, 1):
        scale = empty(tokens, dtype=torch.float32)
        x = triton_products.Scaled(empty(tokens, width, dtype=torch.int8), scale)
        what = f" (of {tokens})"
        triton_products.multiplied(
            x,
            triton_products.Scaled(numbers, empty(outputs, dtype=torch.float32)),
            empty(tokens, outputs),
            triton_products.Beside(wide[:tokens, width:], further),
            empty(outputs),
        )
    meta = torch.device("meta")
    what, store = "", Nf4((outputs, width), meta)
    whole = Int8Rows((outputs, width), meta)
    triton_products.expanded_int8(whole, slice(None), empty(outputs, width))
    levels = empty(16, dtype=torch.float32)
    triton_products.expanded_nf4(store, levels, slice(None), empty(outputs, width))
    triton_backend.launch = usual
    return found


def build(launch: Launch, model: str, rank: int, capability: int, *, count: bool) -> Built:
    """Compiles a kernel as Triton would at its first launch: the same alignments are known."""
    constants = dict(launch.constants)
    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants
    }
    warps = options["num_warps"]
    runtime = {each.name for each in launch.kernel.params if each.do_not_specialize}
    signature: dict[str, str] = {}
    aligned = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.values[place] if place < len(launch.values) else None
        if value is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = mangle_type(value)
            is_tensor = isinstance(value, Tensor)  # torch aligns what it allocates to 512 bytes
            if is_tensor or (isinstance(value, int) and value % 16 == 0 and name not in runtime):
                aligned[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    programs = 1
    for size in launch.grid:
        programs *= size
    registers, spilled = assembled(compiled.asm["ptx"], capability)
    return Built(
        model,
        rank,
        launch.what,
        capability,
        programs,
        32 * warps,
        registers,
        spilled,
        compiled.metadata.shared,
        instructions(compiled.asm["cubin"]) if count else None,
    )


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread, and bytes of spill stores and loads, as the assembler reports them."""
    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        words = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", path]
        done = subprocess.run(
            [*words, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    used = re.search(r"Used (\d+) registers", done.stderr)
    assert used, done.stderr
    return int(used[1]), sum(map(int, spills))


def instructions(cubin: bytes) -> int | None:
    """Machine instructions, padding at the end not counted."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        done = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True)
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(\S.*)", done.stdout, re.MULTILINE)
    return sum(not line.startswith("NOP") for line in lines)


def build_all(
    capabilities: Sequence[int], ranks: Sequence[int], only: Sequence[str], *, count: bool
) -> Iterator[Built]:
    """Every kernel at the first rank; at others those that depend on it, where pairs are many.

    Args:
        count: count their machine instructions, which is half of the time.
    """
    if "products" in only:
        for launch in launches_of_products(ranks[0]):
            for capability in capabilities:
                yield build(launch, PRODUCTS, ranks[0], capability, count=count)
    if "layers" not in only:
        return
    for model, config in models().items():
        for rank in ranks:
            for launch in launches_of_model(config, rank):
                if rank != ranks[0] and (model != "Phi-2" or "," not in launch.what):
                    continue
                for capability in capabilities:
                    yield build(launch, model, rank, capability, count=count)


def table(built: list[Built]) -> list[str]:
    """A row for each kernel; what differs between capabilities is given for each."""
    capabilities = list(dict.fromkeys(each.capability for each in built))
    heads = [f"{each // 10}.{each % 10}" for each in capabilities]
    lines = [
        "Compiled, not run: registers a thread / bytes spilled / KiB of shared memory / machine"
        f" instructions, for compute capabilities {', '.join(heads)}. bf16, {TOKENS:,} tokens"
        f" ({ROWS_OF_LOGITS:,} rows of logits), dropout, adapters on all linear layers.",
        "",
        f"triton {triton.__version__}",
        "",
    ]
    for model in dict.fromkeys(each.model for each in built):
        lines += [
            f"## {model}",
            "",
            f"| rank | kernel | programs x threads | {' | '.join(heads)} |",
        ]
        lines.append("|---|---|---|" + "---|" * len(heads))
        rows: dict[tuple[int, str], list[Built]] = {}
        for each in built:
            if each.model == model:
                rows.setdefault((each.rank, each.kernel), []).append(each)
        for (rank, kernel), row in rows.items():
            cells = [
                f"{each.registers} / {each.spilled_bytes} / {each.shared_bytes / 1024:.0f}"
                f" / {'-' if each.instructions is None else each.instructions}"
                for each in row
            ]
            size = f"{row[0].programs:,} x {row[0].threads}"
            lines.append(f"| {rank} | {kernel} | {size} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CAPABILITIES))
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--json", action="store_true", help="print, and write nothing")
    parser.add_argument("--no_instructions", action="store_true", help="do not count them")
    words = parser.parse_args()
    kinds = words.capabilities, words.ranks, words.only
    built = list(build_all(*kinds, count=not words.no_instructions))
    rows = [asdict(each) for each in built]
    if words.json:
        print(json.dumps(rows))
        return
    found = {"triton": triton.__version__, "kernels": rows}
    save("gpu_kernels", "The kernels for NVIDIA GPUs, compiled", table(built), found)


if __name__ == "__main__":
    main()
