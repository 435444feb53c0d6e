"""Everything that wants a Mac with Apple Silicon, in one command and under 15 minutes.

    python benchmarks/mac.py [--config-phi-2 FILE] [--config-phi-3.5 FILE] [--pieces parity speed]
    python benchmarks/mac.py --tiny --out DIR      # tiny models on any processor, no measurement

Of ours on MLX: gradients against transformers + peft; the peak of the guide's four configurations
beside the plan; tokens/s of training beside mlx-lm and beside torch on the same Mac; tokens/s of an
answer beside mlx-lm's. Weights are random, from a real config.json where one is given, else from
the sizes that phitune knows, Phi-3.5 then with a rotary table that is made up. Where the weights
would take more than 65 % of what macOS recommends to its GPU, layers are left out, and said.

What takes memory is a process of its own: where Metal has none left it ends the process. mlx-lm is
installed into output/mlx-peers-env (--no-peers leaves it out). Writes mac.json and mac.md to
results after every row. What was not run on a Mac is "not yet measured" there. Needs 14 GB of disk
for a while.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_peers
import torch
from cpu_peers import (
    LEARNING_RATE,
    LORA,
    OURS,
    ROWS_PER_STEP,
    SEED,
    Runner,
    build_environment,
    in_loop_order,
    run,
)
from full_size import build_folder
from gpu_common import GB, Row, attempt, chat_lengths, random_rows
from gpu_models import (
    DROPOUT,
    HUB_NAMES,
    RANK,
    Model,
    known_raw,
    random_decoder,
    with_adapter,
)
from gpu_parity import error, gradients_of_peers, judged, our_gradients
from machine import RESULTS, describe
from safetensors.torch import save_file

from phitune.apple import memory
from phitune.apple.choice import fast_engine, load_decoder_on
from phitune.config import Settings
from phitune.data.packing import pack
from phitune.inference.generate import Decoding, generate
from phitune.model.architecture import FAMILIES, ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.engine import ReferenceEngine
from phitune.plan.machine import BUDGET_SHARE
from phitune.plan.memory import AdaptedModel, Shape
from phitune.plan.micro_batch import fewest_recomputed
from phitune.plan.presets import PRESETS
from phitune.training.state import build_adamw, dropout_of

NOT_YET = "not yet measured"
WEIGHTS_SHARE = 0.65  # of the memory that macOS recommends to its GPU
PARITY_LENGTHS = (40, 25, 31, 18, 60, 44)
FP32_GOAL, BF16_GOAL = 1.5, 1.1  # our distance from the truth over theirs
MODELS = tuple(HUB_NAMES)
MAC_PRESETS = tuple(name for name in PRESETS if name.startswith("m3-"))
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT_TOKENS, NEW_TOKENS, DECODE_ROUNDS = 64, 128, 2
STEPS = 2  # the first warms up, and with the second the optimizer's moments are there


def _bf16(runner: Runner, **more: Any) -> Runner:
    name = f"torch on {more['device']}" if "device" in more else runner.name
    setting = runner.setting | {"precision": "bf16", **more}
    return Runner(name, runner.project, runner.worker, runner.what, setting)


def runners() -> list[Runner]:
    """Those of mlx_peers.py in bf16, and ours through torch."""
    by_torch = _bf16(mlx_peers.RUNNERS[0], device=torch_name())
    return [*map(_bf16, mlx_peers.RUNNERS), by_torch]


def torch_name() -> str:
    return "cpu" if platform.system() == "Linux" else "mps"


PIECES: dict[str, tuple[str, ...]] = {
    "parity": tuple(PRECISIONS),
    "presets": MAC_PRESETS,
    "speed": (*(runner.name for runner in mlx_peers.RUNNERS), "torch"),
    "decode": ("phitune", "mlx-lm", "torch"),
}  # with the rows of each, for both models


@dataclass(frozen=True)
class Work:
    """What a piece is told."""

    models: dict[str, Model]
    folders: dict[str, Path]  # with weights, by the model's name
    env: Path | None  # of the peers
    tiny: bool


# -------------------------------------------------------------------------------------------------
# The pieces. Each takes a model and the name of a row.


def parity(work: Work, name: str, precision: str) -> Row:
    """Distances from the plain decoder in fp64, of MLX's engine and of transformers + peft."""
    model, dtype = work.models[name].tiny(), PRECISIONS[precision]
    rows = random_rows(list(PARITY_LENGTHS), model.config.vocab_size)
    batch, cpu = pack(rows), torch.device("cpu")
    plain = random_decoder(model, torch.float64, cpu)
    adapter = with_adapter(plain, model.modules, 0.0, random_B=True)
    truth = our_gradients(ReferenceEngine(plain), adapter, batch)

    decoder = random_decoder(model, dtype, cpu)
    theirs = gradients_of_peers(
        model, decoder, with_adapter(decoder, model.modules, 0.0, random_B=True), rows, cpu
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = random_decoder(model, dtype, cpu).named_weights()
        tensors = {key: tensor.detach().contiguous() for key, tensor in weights.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        on_mlx = load_decoder_on(Path(folder), model.config, dtype, "mlx")
    adapter = with_adapter(on_mlx, model.modules, 0.0, random_B=True)
    ours = our_gradients(fast_engine(on_mlx, 0.0, 0), adapter, batch)
    found: Row = {"ours": error(ours, truth)}
    found |= {f"theirs, {kind}": error(each, truth) for kind, each in theirs.items()}
    return found | judged(ours, theirs, truth, FP32_GOAL if precision == "fp32" else BF16_GOAL)


def presets(work: Work, name: str, preset_name: str) -> Row:
    """The peak of two steps on the largest micro-batch of a configuration, beside its plan."""
    model, preset = work.models[name], PRESETS[preset_name]
    max_length = preset.max_length // 32 if work.tiny else preset.max_length
    lengths = (max_length,) * preset.batch_size
    plan = fewest_recomputed(
        AdaptedModel(model.config, model.modules, RANK, "bf16", preset.device),
        Shape(lengths, preset.batch_size * (max_length - 1)),
        round(BUDGET_SHARE[preset.device] * preset.memory.bytes),
    )
    decoder = load_decoder_on(work.folders[name], model.config, torch.bfloat16, "mlx")
    adapter = with_adapter(decoder, model.modules, DROPOUT)
    engine = fast_engine(decoder, DROPOUT, plan.recompute_layers)
    optimizer = build_adamw(adapter.parameters(), weight_decay=0.0)
    batch = pack(random_rows(list(lengths), model.config.vocab_size, trained=1.0))
    for step in range(1, STEPS + 1):
        dropout = dropout_of(batch, Settings(lora_dropout=DROPOUT), step, engine.device)
        engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)
        optimizer.step()
        if step < STEPS:
            optimizer.zero_grad()
    # The adapter, its gradients and the optimizer's moments are torch's, in the same memory.
    of_torch = sum(4 * parameter.nbytes for parameter in adapter.parameters())
    peak = memory.peak_bytes() + of_torch
    return {
        "rows": f"{preset.batch_size} x {max_length}",
        "recomputed_layers": plan.recompute_layers,
        "peak_gb": peak / GB,
        "plan_gb": plan.bytes / GB,
        "plan_error": plan.tensor_bytes / peak - 1,
        "guide_gb": preset.guide_gb,
        "under_guide": peak <= preset.guide_gb * GB,
    }


def speed(work: Work, name: str, runner_name: str) -> Row:
    """Real tokens/s of an optimizer step, by the workers of mlx_peers.py."""
    place = PIECES["speed"].index(runner_name)
    runner, model = runners()[place], work.models[name]
    if runner.project != OURS and work.env is None:
        return {"left_out": "mlx-lm not installed"}
    ours = runner.project == OURS
    python = Path(sys.executable) if ours or not work.env else work.env / "bin" / "python"
    found = run(python, runner, training_job(work, name), work.folders[name])
    told = ("failed", "tokens_per_second", "mlx_peak_gib", "peak_gib", "losses", "tokens")
    return {"setting": f"{model.name}: {runner.name}, {runner.what}"} | {
        key: found[key] for key in told if key in found
    }


def training_job(work: Work, name: str) -> dict[str, Any]:
    """Rows of random tokens with the lengths of a chat data set, for two steps."""
    config, count = work.models[name].config, STEPS * ROWS_PER_STEP
    lengths = [16 + index for index in range(3 * count)] if work.tiny else chat_lengths(30_000)
    rows = [
        {"input_ids": row.input_ids, "labels": row.labels}
        for row in random_rows(lengths, config.vocab_size)
    ]
    return {
        "model": str(work.folders[name]),
        "steps": STEPS,
        "rows_per_step": ROWS_PER_STEP,
        "seed": SEED,
        "learning_rate": LEARNING_RATE,
        "lora": LORA | {"modules": FAMILIES[config.model_type].all_linear},
        **in_loop_order(rows, count, STEPS),
    }


def decode(work: Work, name: str, side: str) -> Row:
    """Tokens/s of one answer."""
    model, folder = work.models[name], work.folders[name]
    vocab_size, new_tokens = model.config.vocab_size, 8 if work.tiny else NEW_TOKENS
    prompt = [3 * place % (vocab_size - 1) + 1 for place in range(PROMPT_TOKENS)]
    if side == "mlx-lm":
        if work.env is None:
            return {"left_out": "mlx-lm not installed"}
        worker = Path(__file__).parent / "peers" / "decode_mlx_lm.py"
        path = folder / "job.json"
        job = {"model": str(folder), "prompt": prompt, "new_tokens": new_tokens}
        path.write_text(json.dumps(job | {"rounds": DECODE_ROUNDS}))
        done = subprocess.run(
            [work.env / "bin" / "python", worker, path], check=True, capture_output=True, text=True
        )
        found: Row = json.loads(done.stdout.splitlines()[-1])
        return found
    device = "mlx" if side == "phitune" else torch_name()
    decoder = load_decoder_on(folder, model.config, torch.bfloat16, device)
    rates = []
    for _ in range(DECODE_ROUNDS):
        # The prompt's own time is that of an answer of one token.
        seconds = [seconds_of_answer(decoder, prompt, count) for count in (1, new_tokens + 1)]
        rates.append(new_tokens / (seconds[1] - seconds[0]))
    return {"device": device, "tokens_per_second": max(rates)}


def seconds_of_answer(decoder: Any, prompt: list[int], new_tokens: int) -> float:
    started = time.perf_counter()
    generate(decoder, [prompt], Decoding(new_tokens))
    return time.perf_counter() - started


FUNCTIONS = {"parity": parity, "presets": presets, "speed": speed, "decode": decode}


# -------------------------------------------------------------------------------------------------
# Models, and the processes that the pieces run in.


def read_models(given: dict[str, Path | None], *, tiny: bool) -> dict[str, Model]:
    """Both models, with fewer layers where the memory of this machine asks for it."""
    models = {}
    for name in MODELS:
        if path := given[name]:
            raw, source = json.loads(path.read_text()), path.name
        else:
            raw, source = known_raw(name), "phitune's table of sizes"
            if raw["model_type"] == "phi3":
                half = raw["hidden_size"] // raw["num_attention_heads"] // 2
                factors = {"short_factor": [1.0] * half, "long_factor": [1.0] * half}
                raw["rope_scaling"] = {"type": "longrope", **factors}
                raw["original_max_position_embeddings"] = 4096
                source += ", with a rotary table that is made up"
        for unwanted in ("auto_map", "_name_or_path", "torch_dtype"):
            raw.pop(unwanted, None)
        model = Model(name, raw | {"resid_pdrop": 0.0, "torch_dtype": "bfloat16"}, source)
        models[name] = model.tiny() if tiny else fitting(model)
    return models


def fitting(model: Model) -> Model:
    """With as many layers as this machine has memory for."""
    limit = WEIGHTS_SHARE * (memory.recommended_bytes() or 18 * GB * 2 / 3)
    layers = model.config.num_hidden_layers
    per_layer = weight_bytes(model.config) - weight_bytes(model.with_layers(1).config)
    per_layer //= max(1, layers - 1)
    others = weight_bytes(model.with_layers(1).config) - per_layer
    fits = max(1, min(layers, int((limit - others) // per_layer)))
    if fits == layers:
        return model
    fewer = model.with_layers(fits)
    return Model(model.name, fewer.raw, f"{model.source}, {fits} of {layers} layers")


def weight_bytes(config: ModelConfig) -> int:
    weights = Decoder(config, torch.bfloat16, "meta").named_weights()
    return sum(weight.nbytes for weight in weights.values())


def build_folders(models: dict[str, Model], folder: Path) -> dict[str, Path]:
    """Random weights of both, in folders under one."""
    folders = {}
    for name, model in models.items():
        target = folders[name] = folder / name
        target.mkdir()
        source = folder / f"{name}.json"
        source.write_text(json.dumps(model.raw))
        build_folder(model.config, source, target)
    return folders


def run_row(piece: str, name: str, row: str, work: Work, folder: Path) -> Row:
    """One row, in a process of its own where it takes memory, as the workers of speed are."""
    started = time.monotonic()
    if work.tiny or piece in ("parity", "speed"):
        found = measured(piece, name, row, work)
    else:
        words = [__file__, "--row", piece, name, row, "--work", folder]
        words += ["--env", work.env] if work.env else ["--no-peers"]
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            found = {"failed": f"exit code {done.returncode}: {said[-1] if said else 'no output'}"}
        else:
            found = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": round(time.monotonic() - started, 1)}


def measured(piece: str, name: str, row: str, work: Work) -> Row:
    """What a piece finds, or why it finds nothing."""
    found, reason = attempt(lambda: FUNCTIONS[piece](work, name, row))
    return found if found is not None else {"failed": reason}


def child(options: argparse.Namespace) -> int:
    folder, models = options.work, {}
    for name in MODELS:
        models[name] = Model(name, json.loads((folder / f"{name}.json").read_text()), "")
    work = Work(models, {name: folder / name for name in MODELS}, options.env, options.tiny)
    print("\n" + json.dumps(measured(*options.row, work)))
    return 0


# -------------------------------------------------------------------------------------------------
# The report.


def blank() -> dict[str, Any]:
    """A report of nothing."""
    rows = {
        piece: {f"{model}, {name}": {} for model in MODELS for name in names}
        for piece, names in PIECES.items()
    }
    return {"on_a_mac": False, "machine": {}, "models": {}, "pieces": rows}


HEAD = f"""# On a Mac

Made by `python benchmarks/mac.py`, which says in its first lines what it runs. What has not been
run on a Mac is "{NOT_YET}".

- **Parity**: tiny models. The distance of all adapter gradients from the plain decoder's in fp64,
  ours on MLX and that of transformers + peft on the CPU; at most {FP32_GOAL} times theirs in fp32
  and {BF16_GOAL} in bf16 is the goal.
- **Presets**: the guide's configurations, two steps on full rows. The peak is MLX's and what the
  adapter takes of torch; beside it the plan, and the figure of the guide. The planner's error over
  more settings is that of `benchmarks/mlx_memory.py`.
- **Speed**: training in bf16, rows as long as those of chat data, {ROWS_PER_STEP} a step; each
  setting a process.
  What differs between the two is said in [mlx_peers](mlx_peers.md). torch is phitune through torch,
  on the same Mac's GPU.
- **Decode**: one answer of {NEW_TOKENS} tokens after {PROMPT_TOKENS}, in bf16.
"""
COLUMNS = {
    "parity": ("ours", "ours / theirs", "met"),
    "presets": ("rows", "recomputed_layers", "peak_gb", "plan_gb", "plan_error", "guide_gb"),
    "speed": ("tokens_per_second", "mlx_peak_gib", "peak_gib"),
    "decode": ("tokens_per_second",),
}


def markdown(results: dict[str, Any]) -> str:
    lines = [HEAD]
    for piece, rows in results["pieces"].items():
        columns = COLUMNS[piece]
        lines += [f"## {piece.capitalize()}", ""]
        lines += ["| | " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
        lines += ["|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            if not results["on_a_mac"] or not row:
                cells = [NOT_YET] + [""] * (len(columns) - 1)
            elif reason := row.get("failed") or row.get("left_out"):
                cells = [reason] + [""] * (len(columns) - 1)
            else:
                cells = [cell(row.get(column)) for column in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    if results["on_a_mac"]:
        lines += [f"- {name}: {source}" for name, source in results["models"].items()]
        lines += ["", ", ".join(f"{key} {value}" for key, value in results["machine"].items())]
    return "\n".join(lines).rstrip() + "\n"


def cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "**no**", None: ""}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mac.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "mac.md").write_text(markdown(results))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="phitune on a Mac.")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--config-phi-2", type=Path, help="config.json of Phi-2")
    parser.add_argument(
        "--config-phi-3.5", dest="config_phi_3_5", type=Path, help="config.json of Phi-3.5"
    )
    parser.add_argument("--env", type=Path, default=mlx_peers.ROOT / "output" / "mlx-peers-env")
    parser.add_argument("--no-peers", action="store_true", help="without mlx-lm")
    parser.add_argument("--out", type=Path, help="folder of mac.json and mac.md (default: results)")
    parser.add_argument("--tiny", action="store_true", help="tiny models; measures nothing")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.env = None if options.no_peers else options.env.absolute()
    out = (options.out or RESULTS).resolve()
    if options.tiny and not options.row and out == RESULTS.resolve():
        parser.error("--tiny: needs --out, a folder other than results")
    options.out = out
    return options


def main() -> int:
    options = read_options()
    if options.row:
        return child(options)
    on_a_mac = bool(mx.metal.is_available())
    if not on_a_mac and not options.tiny:
        print(
            "mac.py needs a Mac with Apple Silicon and MLX; --tiny --out DIR runs its code with"
            " tiny models and measures nothing",
            file=sys.stderr,
        )
        return 2
    if options.env and build_environment(options.env, mlx_peers.PACKAGES, mlx_peers.PROOF):
        options.env = None
    given = {"phi-2": options.config_phi_2, "phi-3.5": options.config_phi_3_5}
    models = read_models(given, tiny=options.tiny)
    results = blank() | {
        "on_a_mac": on_a_mac and not options.tiny,
        "machine": describe(("mlx",)),
        "models": {name: model.source for name, model in models.items()},
    }
    with tempfile.TemporaryDirectory() as folder:
        folders = build_folders(models, Path(folder))
        work = Work(models, folders, options.env, options.tiny)
        for piece in options.pieces:
            for model in MODELS:
                for row in PIECES[piece]:
                    found = run_row(piece, model, row, work, Path(folder))
                    results["pieces"][piece][f"{model}, {row}"] = found
                    told = {"piece": piece, "model": model, "row": row, **found}
                    print(json.dumps(told), flush=True)
                    save(results, options.out)
    print(f"written to {options.out / 'mac.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
