"""Ours on MLX beside mlx-lm: the same rows, in turn, in one run.

    python benchmarks/mlx_peers.py [--rounds 2] [--cases small-phi-2 small-phi-3.5]

As cpu_peers.py, whose pieces it uses, for the two that compute with MLX: on a Mac its GPU,
elsewhere a CPU, where MLX multiplies at 1 to 5 GFLOP/s; the models are small ones. mlx-lm lives in
an environment of its own that this script builds once (--env), with the MLX that ours has. Writes
results/mlx_peers.json after every run, and mlx_peers.md; under ten minutes on two idle cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from cpu_peers import (
    FOUR,
    LEARNING_RATE,
    LORA,
    ONE,
    OURS,
    PHI_2,
    PHI_3_5,
    ROOT,
    ROWS_PER_STEP,
    SEED,
    Case,
    Runner,
    build_environment,
    make_model,
    make_rows,
    middle,
    run,
    say,
    with_spread,
)
from machine import RESULTS, describe

from phitune.model.architecture import FAMILIES

MLX_LM = "mlx-lm"
PACKAGES = (
    (MLX_LM, [f"mlx{'' if sys.platform == 'darwin' else '[cpu]'}=={version('mlx')}", "numpy"]),
    (MLX_LM, ["psutil", "transformers==5.23.*", "mlx-lm[train]==0.32.2"]),
)
PROOF = {MLX_LM: "import psutil, mlx_lm.tuner.trainer"}
SAME_LOSS = 2e-5  # as cpu_peers.py


def _ours(name: str, what: str, shape: tuple[int, int], *, recompute: bool = False) -> Runner:
    setting = {"batch": shape[0], "accumulate": shape[1], "recompute": recompute, "device": "mlx"}
    return Runner(name, OURS, "with_phitune.py", what, setting)


def _theirs(name: str, what: str, shape: tuple[int, int], **more: bool) -> Runner:
    setting = {"batch": shape[0], "accumulate": shape[1], "recompute": False, **more}
    return Runner(name, MLX_LM, "with_mlx_lm.py", what, setting)


RUNNERS = (
    _ours("phitune", "4 x 4", FOUR),
    _ours("phitune-1x16", "1 x 16", ONE),
    _ours("phitune-recompute", "4 x 4, recomputed", FOUR, recompute=True),
    _theirs("mlx-lm", "4 x 4", FOUR),
    _theirs("mlx-lm-sorted", "4 x 4, by length: its own order", FOUR, grouped=True),
    _theirs("mlx-lm-1x16", "1 x 16", ONE),
    _theirs("mlx-lm-recompute", "4 x 4, recomputed", FOUR, recompute=True),
)
PAIRS = (
    ("phitune", "mlx-lm-sorted"),
    ("phitune", "mlx-lm"),
    ("phitune-1x16", "mlx-lm-1x16"),
    ("phitune-recompute", "mlx-lm-recompute"),
)

# The vocabulary is cut to what keeps the head's share of the products near that of the real models
# (5 and 3 %); ids are taken modulo it, which random weights do not notice.
SMALL: dict[str, Any] = {"num_hidden_layers": 4, "vocab_size": 512}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL_PHI_2 = SMALL | {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
SMALL_PHI_2 |= {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}
# A head of 96, as its rotary factors are.
SMALL_PHI_3_5 = SMALL | {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 1}
SMALL_PHI_3_5 |= {"num_key_value_heads": 1}
CASES = (
    Case("small-phi-2", PHI_2, SMALL_PHI_2, 1, all_runners=True),
    Case("small-phi-3.5", PHI_3_5, SMALL_PHI_3_5, 1, all_runners=True),
)


def with_one_rotary_table(case: Case, shared: Path) -> Case:
    """mlx-lm knows Phi-3.5's table for long rows alone; both sides are given it for all rows."""
    source = shared / "data" / "tokenizers" / case.source / "config.json"
    scaling = json.loads(source.read_text()).get("rope_scaling")
    if not scaling:
        return case
    one = {"rope_scaling": scaling | {"short_factor": scaling["long_factor"]}}
    return Case(case.name, case.source, case.changes | one, case.steps, case.all_runners)


def job_of(case: Case, options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """What every runner of a case is told."""
    config = make_model(case, options.shared, model)
    steps = 1 + (options.steps or case.steps)
    told = make_rows(model, options.shared, options.loss, options.rows, steps)
    for name in ("pool", "rows", "grouping_pool"):
        for row in told[name]:
            row["input_ids"] = [token % config["vocab_size"] for token in row["input_ids"]]
            row["labels"] = [
                label if label < 0 else label % config["vocab_size"] for label in row["labels"]
            ]
    return {
        "model": str(model),
        "steps": steps,
        "rows_per_step": ROWS_PER_STEP,
        "seed": SEED,
        "learning_rate": LEARNING_RATE,
        "lora": LORA | {"modules": FAMILIES[config["model_type"]].all_linear},
        **told,
    }


def measure(case: Case, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """All rounds of a case, saved after every run."""
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary)
        job = job_of(with_one_rotary_table(case, options.shared), options, model)
        entry: dict[str, Any] = {"steps": job["steps"] - 1, "loss": options.loss, "runs": {}}
        results["cases"][case.name] = entry
        for number in range(options.rounds):
            print(f"{case.name}: round {number + 1} of {options.rounds}", flush=True)
            # Back and forth, so that a machine that tires treats nobody worse.
            for runner in RUNNERS if number % 2 == 0 else RUNNERS[::-1]:
                ours = runner.project == OURS
                python = Path(sys.executable) if ours else options.env / "bin" / "python"
                found = run(python, runner, job, model)
                entry["runs"].setdefault(runner.name, []).append(found)
                say(runner.name, found)
                entry["summary"] = summary(entry["runs"])
                save(results, options.results)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each runner that ran: medians with their spread, and peaks."""
    shown: dict[str, dict[str, Any]] = {}
    for name, results in runs.items():
        if good := [result for result in results if "failed" not in result]:
            shown[name] = {
                "tokens_per_second": middle([result["tokens_per_second"] for result in good]),
                "tokens_per_cpu_second": middle([per_cpu_second(result) for result in good]),
                "mlx_peak_mib": 1024 * max(result["mlx_peak_gib"] for result in good),
                "peak_mib": 1024 * max(result["peak_gib"] for result in good),
                "first_step_seconds": middle([result["first_step_seconds"] for result in good]),
                "first_loss": good[0]["losses"][0],
            }
    if shown:
        truth = statistics.median(one["first_loss"] for one in shown.values())
        for one in shown.values():
            one["loss_agrees"] = abs(one["first_loss"] - truth) <= SAME_LOSS
    return shown


def per_cpu_second(result: dict[str, Any]) -> float:
    """Tokens of the measured steps by the processor time they took."""
    return float(sum(result["tokens"][1:]) / sum(result["cpu_seconds"][1:]))


def save(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mlx_peers.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "mlx_peers.md").write_text(markdown(results))


HEAD = f"""# Ours on MLX beside mlx-lm

Made by `python benchmarks/mlx_peers.py`. How to read it:

- **tokens/s** are real tokens, padding not counted, over the optimizer steps after the first, which
  warms up: the median over the rounds, and the lowest and highest. In a round every setting runs
  once, in a process of its own, in turn. **By processor s** are those tokens by the time of the
  processor that they took, on all cores together: other processes of a busy machine are not in it.
  The figures of 2026-11-27 are of a busy one, with a load of five on two cores.
- **MLX peak** is `mx.get_peak_memory` of the process, loading included, **resident** its highest
  resident memory; ours has torch in it, mlx-lm has no torch installed. **first step** is the time
  from the start of the process to the end of its first optimizer step.
- **first loss** is that of the first step, where every adapter is still zero: the sum over its
  trained tokens by their number, marked where it differs from the others' by more than
  {SAME_LOSS:g}.
- The same for both: a random model of fp32 weights built from the real config.json, smaller; GSM8K
  rows in phitune's order as phitune's tokens, ids modulo the cut vocabulary; LoRA of rank
  {LORA["r"]}, alpha {LORA["alpha"]}, dropout {LORA["dropout"]} on all linear layers; AdamW;
  {ROWS_PER_STEP} rows an optimizer step (4 x 4: four micro-batches of four); only answers are
  trained.
- mlx-lm runs its own `train` with its own loss, compiled as it compiles it. Different from ours:
  it pads to multiples of 32 tokens, computes the logits of all positions, takes the mean of the
  micro-batches' means, does not correct AdamW's bias and clips no gradient. It is told where
  answers begin and end; by itself it would also train one token of padding a row. By length: its
  own order, the rows of a whole data set sorted, here of 200 rows, of which micro-batches evenly
  spaced are run.
- Phi-3.5 has its long rotary factors at every length on both sides: mlx-lm 0.32.2 takes them for
  rows of any length, so its losses would be others than transformers' below 4,096 tokens.
"""


def markdown(results: dict[str, Any]) -> str:
    lines = [HEAD, f"Computed on {results['device']}."]
    for name, entry in results["cases"].items():
        lines += ["", f"## {name}", ""]
        lines += ["| | setting | tokens/s | by processor s | MLX peak MiB | resident MiB |"]
        lines[-1] += " first step s | first loss |"
        lines += ["|---|---|---|---|---|---|---|---|"]
        shown = entry.get("summary", {})
        for runner in RUNNERS:
            label = f"| {'**phitune**' if runner.project == OURS else runner.project}"
            label += f" | {runner.what} |"
            if one := shown.get(runner.name):
                mark = "" if one["loss_agrees"] else " **differs**"
                lines.append(
                    f"{label} {with_spread(one['tokens_per_second'])}"
                    f" | {with_spread(one['tokens_per_cpu_second'])} | {one['mlx_peak_mib']:.0f}"
                    f" | {one['peak_mib']:.0f} | {one['first_step_seconds']['median']:.1f}"
                    f" | {one['first_loss']:.5f}{mark} |"
                )
            elif failed := entry["runs"].get(runner.name):
                lines.append(f"{label} failed: {failed[-1]['failed']} | | | | | |")
        lines += ["", *against(shown)]
        lines += [f"{entry['steps']} measured step(s) a run, loss on {entry['loss']}."]
    told = dict(results["machine"])
    for entry in results["cases"].values():
        for runs in entry["runs"].values():
            for one in runs:
                told |= one.get("versions", {})
    told = {key: value for key, value in told.items() if value != "none"}
    return (
        "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in told.items())]) + "\n"
    )


def against(shown: dict[str, Any]) -> list[str]:
    """Ours as a multiple of mlx-lm's, setting by setting."""
    lines = []
    for ours, theirs in PAIRS:
        if ours in shown and theirs in shown:
            one, other = shown[ours], shown[theirs]
            speed = one["tokens_per_second"]["median"] / other["tokens_per_second"]["median"]
            cpu = one["tokens_per_cpu_second"]["median"] / other["tokens_per_cpu_second"]["median"]
            memory = one["mlx_peak_mib"] / other["mlx_peak_mib"]
            lines.append(
                f"- {ours} beside {theirs}: {speed:.2f} x the tokens/s"
                f" ({cpu:.2f} x by processor time), {memory:.2f} x the MLX peak"
            )
    return [*lines, ""] if lines else []


def where() -> str:
    if mx.metal.is_available():
        return f"a Mac's GPU ({mx.device_info()['device_name']})"
    return "a CPU, with MLX's build for Linux; a Mac's figures are not yet measured"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="phitune on MLX beside mlx-lm.")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--loss", choices=["answers", "all"], default="answers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="measured steps (default: 1)")
    parser.add_argument("--rows", type=int, default=64, help="rows of an epoch, a multiple of 16")
    parser.add_argument("--env", type=Path, default=ROOT / "output" / "mlx-peers-env")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.env = options.env.absolute()
    return options


def main() -> int:
    options = read_options()
    if missing := build_environment(options.env, PACKAGES, PROOF):
        print(f"{MLX_LM} is missing: {missing[MLX_LM]}", file=sys.stderr)
        return 1
    results: dict[str, Any] = {"machine": describe(("mlx",)), "device": where(), "cases": {}}
    for case in CASES:
        if case.name in options.cases:
            measure(case, options, results)
    print((options.results / "mlx_peers.md").read_text().removeprefix(HEAD))
    wrong = [
        f"{name}: {runner}"
        for name, entry in results["cases"].items()
        for runner in entry["runs"]
        if not entry.get("summary", {}).get(runner, {}).get("loss_agrees")
    ]
    if wrong:
        print("NOT COMPARABLE:\n  " + "\n  ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
