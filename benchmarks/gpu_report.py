"""gpu.json as Markdown: a table for each piece, and in words what is not measured, and why."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Cell = Callable[[Row], str]

PIECES = {
    "gemm": "The rate of the GPU's products in bf16, 4096 x 2560 x 17920: what MFU is a share of.",
    "products": "Products of the same shape with the weight in bf16 and in fewer bits, both ways,"
    " 32 columns of adapters beside; few tokens as answers have them. TFLOP/s of the frozen"
    " weight's multiplications alone, median (lowest..highest).",
    "parity": "Adapter gradients of the engine and of transformers + peft, their errors against"
    " fp64: full width, 4 layers, rows of 12 to 256 tokens, packed on our side, one by one on"
    " theirs. Attention's kernels, and dropout masks beside the CPU's.",
    "profile": "A micro-batch (forward, loss, backward) of full-size models, every token trained,"
    " nothing recomputed: how long it takes, how long the host is busy starting it (with the device"
    " idle before), and which kernels take the time. TFLOP/s are 4N a token, and no more.",
    "saved_bytes": "What a layer keeps of a token from its forward to its backward: bf16, rank 8"
    " on all linear layers, dropout 0.05.",
    "presets": "Peak memory of the training guide's configurations, bf16, with the process limited"
    " to 24 GB, rows of full length, every token trained; planned for 24 GB and for the guide's"
    " figure. The guide's figure is held against what is reserved, the CUDA context included.",
    "planner": "Predicted and measured peak over the grid of memory_plan.py.",
    "decode": "Greedy answers in bf16: prompts of 64 tokens, 64 new ones each; tokens/s of all"
    " sequences together, each side in turn, median (lowest..highest). The limit of one sequence is"
    " the weights read once a token, at the rate of a copy's reading and writing together.",
    "speed": "Optimizer steps on the same rows, in turn: real tokens/s, median of up to three"
    " rounds (lowest..highest). MFU is 4N x tokens / time / the measured rate of products, the head"
    " counted at trained positions only (60 % of a row). Theirs runs under autocast, as Trainer"
    " does with bf16=True; tokens of padding do not count. First step includes compilation; graphs"
    " are dynamo's in the first and in the second step. GB are the peak beyond all weights. Both"
    " sides' weights are on the GPU.",
}
NOT_YET = """\
**Not yet measured.** No NVIDIA GPU was at hand when this was written, and nothing here is
estimated. On a machine with one,

    python benchmarks/gpu.py

takes at most 8 minutes and overwrites this file and gpu.json. Its code is rehearsed on the CPU with
tiny models by tests/benchmarks/test_gpu.py; kernels that only a GPU has are not covered by that. It
will measure, with full-size random Phi-2 and Phi-3.5 in bf16:
"""


def markdown(results: dict[str, Any]) -> str:
    """The whole report; with no results, what will be in it."""
    lines = ["# On an NVIDIA GPU", ""]
    if not results:
        lines += [NOT_YET]
        lines += [f"- **{name.replace('_', ' ')}**: {what}" for name, what in PIECES.items()]
        return "\n".join(lines) + "\n"
    lines += [f"Made by `python benchmarks/gpu.py`. **{sentence(results['status'])}**.", ""]
    lines += [", ".join(f"{key} {value}" for key, value in results["machine"].items())]
    models = [f"{name} from {source}" for name, source in results["models"].items()]
    lines += ["", f"Random weights, the same for both sides: {'; '.join(models)}."]
    taken = results.get("minutes_taken")
    lines += [
        f"{taken} of {results['minutes_allowed']:g} minutes."
        if taken is not None
        else "Not finished."
    ]
    lines += [f"Not installed: {name}, {why}." for name, why in results["left_out"].items()]
    for name, what in PIECES.items():
        entry = results["pieces"][name]
        lines += ["", f"## {name.replace('_', ' ').capitalize()}", "", what, ""]
        lines += [f"Status: {entry['status']}."]
        if rows := entry.get("rows"):
            lines += ["", *TABLES[name](rows)]
            lines += reasons(rows)
    return "\n".join(lines) + "\n"


def sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def reasons(rows: list[Row]) -> list[str]:
    """Rows that hold no measurement, and why, those with the same reason together."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for kind in ("failed", "left_out"):
            if kind in row:
                found.setdefault(f"{kind.replace('_', ' ')}: {row[kind]}", []).append(title(row))
    return [line for why, who in found.items() for line in ("", f"- {why}: {'; '.join(who)}")]


def title(row: Row) -> str:
    names = ("model", "mix", "side", "what", "preset", "rows", "planned_for_gb", "setting")
    return ", ".join(str(row[name]) for name in names if name in row)


def table(columns: dict[str, Cell], rows: list[Row]) -> list[str]:
    measured = [row for row in rows if not {"failed", "left_out"} & set(row)]
    if not measured:
        return []
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    cells = [[cell(row) for cell in columns.values()] for row in measured]
    return lines + ["| " + " | ".join(row) + " |" for row in cells]


def plain(name: str, form: str = "") -> Cell:
    """A value as it is, or an empty cell."""
    return lambda row: "" if row.get(name) is None else format(row[name], form)


def spread(name: str, form: str) -> Cell:
    def cell(row: Row) -> str:
        if name not in row:
            return ""
        values = row[name]
        return f"{values['median']:{form}} ({values['min']:{form}}..{values['max']:{form}})"

    return cell


def yes(name: str) -> Cell:
    return lambda row: {True: "yes", False: "**no**"}.get(row.get(name), "")  # type: ignore[arg-type]


def gemm_table(rows: list[Row]) -> list[str]:
    return table(
        {"TFLOP/s": spread("tflops", ".1f"), "datasheet": plain("datasheet")},
        rows,
    )


def products_table(rows: list[Row]) -> list[str]:
    lines = [f"{row['what']}: {row['note']}." for row in rows if "note" in row]
    lines += [
        f"{row['what']}: {spread('gb_per_s', '.0f')(row)} GB/s."
        for row in rows
        if "gb_per_s" in row
    ]
    return [
        *([*lines, ""] if lines else []),
        *table(
            {
                "weight": plain("what"),
                "tokens": plain("tokens", ","),
                "forward, TFLOP/s": spread("forward", ".1f"),
                "back, TFLOP/s": spread("back", ".1f"),
                "forward, us": spread("forward_us", ".0f"),
                "back, us": spread("back_us", ".0f"),
            },
            [row for row in rows if "forward" in row],
        ),
    ]


def profile_table(rows: list[Row]) -> list[str]:
    def milliseconds(name: str) -> Cell:
        return lambda row: f"{1e3 * row[name]['median']:.1f}" if name in row else ""

    measured = [row for row in rows if "tokens_per_second" in row]
    lines = table(
        {
            "model": plain("model"),
            "base": plain("base"),
            "rows": plain("mix"),
            "ms": milliseconds("seconds"),
            "issue ms": milliseconds("issue_seconds"),
            "kernels ms": plain("kernel_ms", ".1f"),
            "launches": plain("launches", ","),
            "tokens/s": plain("tokens_per_second", ",.0f"),
            "TFLOP/s": plain("tflops_4n", ".0f"),
        },
        measured,
    )
    for row in measured:
        if "kernels" not in row:
            continue
        lines += [
            "",
            f"{row['model']}, {row['base']}, {row['mix']}:",
            "",
            "| kernel | calls | ms |",
            "|---|---|---|",
        ]
        lines += [
            f"| {each['name']} | {each['calls']} | {each['ms']:.2f} |" for each in row["kernels"]
        ]
    return lines


def parity_table(rows: list[Row]) -> list[str]:
    def of(start: str) -> list[Row]:
        return [row for row in rows if row["what"].startswith(start)]

    error = ".2e"
    lines = table(
        {
            "gradients": lambda row: f"{row['model']}, {row['what'].removeprefix('gradients, ')}",
            "our error": plain("ours", error),
            "theirs": plain("theirs, plain", error),
            "theirs, autocast": plain("theirs, autocast", error),
            "theirs, bf16 throughout": plain("theirs, bf16 throughout", error),
            "ours / theirs": plain("ours / theirs", ".3f"),
            "goal": plain("goal"),
            "met": yes("met"),
            "recomputed: same bits": yes("recomputation changes no bit"),
            "twice: same bits": yes("the same twice by default"),
        },
        of("gradients"),
    )
    ways = [row for row in of("attention") if not {"failed", "left_out"} & set(row)]
    if ways:
        lines += [
            "",
            "| attention, error against fp64 | out | dq | dk | dv |",
            "|---|---|---|---|---|",
        ]
        for row in ways:
            for way, errors in row.items():
                if isinstance(errors, dict):
                    cells = " | ".join(f"{value:.2e}" for value in errors.values())
                    lines.append(f"| {row['model']}, {way} | {cells} |")
    for row in of("dropout"):
        if "equal" in row:
            lines += ["", f"{sentence(row['what'])}: {'yes' if row['equal'] else '**no**'}."]
    for row in of("Triton"):
        if "difference" in row:
            lines += ["", f"{row['model']}, {row['what']}: {row['difference']:.2e} apart."]
    return lines


def saved_table(rows: list[Row]) -> list[str]:
    return table(
        {
            "model": plain("model"),
            "": plain("side"),
            "KiB a token and layer": plain("kib", ".1f"),
            "as planned": plain("plan_kib", ".1f"),
            "the ideal": plain("ideal_kib", ".1f"),
        },
        rows,
    )


def presets_table(rows: list[Row]) -> list[str]:
    gigabytes = ".2f"
    return table(
        {
            "model": plain("model"),
            "preset": plain("preset"),
            "rows": plain("rows"),
            "planned for GB": plain("planned_for_gb"),
            "recomputed": lambda row: f"{row['recomputed_layers']} of {row['layers']}",
            "plan GB": plain("plan_gb", gigabytes),
            "allocated": plain("allocated_gb", gigabytes),
            "reserved": plain("reserved_gb", gigabytes),
            "with context": plain("with_context_gb", gigabytes),
            "error": plain("error", "+.2%"),
            "guide GB": plain("guide_gb"),
            "under it": yes("under_guide"),
        },
        rows,
    )


def planner_table(rows: list[Row]) -> list[str]:
    errors = [row["error"] for row in rows if "error" in row]
    if not errors:
        return []
    return [
        f"{len(errors)} settings; the plan is between {min(errors):+.2%} and {max(errors):+.2%} of"
        " max_memory_allocated.",
        "",
        *table(
            {
                "setting": plain("setting"),
                "predicted MiB": lambda row: f"{row['predicted_bytes'] / 2**20:.1f}",
                "measured MiB": lambda row: f"{row['measured_bytes'] / 2**20:.1f}",
                "error": plain("error", "+.2%"),
                "held before": lambda row: f"{row['held_before_bytes'] / 2**20:.1f}",
                "error beyond that": plain("error_beyond_that", "+.2%"),
                "peak in the": plain("peak_at"),
            },
            rows,
        ),
    ]


def speed_table(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "tokens_per_second" in row:
            groups.setdefault((row["model"], row["mix"]), []).append(row)
    for (model, mix), found in groups.items():
        found.sort(key=lambda row: -row["tokens_per_second"]["median"])
        lines += ["", f"### {model}, {mix}", ""]
        lines += table(
            {
                "": lambda row: f"**{row['side']}**" if row["side"] == "phitune" else row["side"],
                "setting": plain("what"),
                "tokens/s": spread("tokens_per_second", ",.0f"),
                "MFU": plain("mfu", ".1%"),
                "layers recomputed": plain("recomputed_layers"),
                "GB": plain("gb_beyond_weights", ".2f"),
                "first step s": plain("first_step_seconds", ".1f"),
                "graphs": lambda row: (
                    f"{row['dynamo_graphs']} + {row['dynamo_graphs_in_second_step']}"
                ),
                "first loss": plain("first_loss", ".4f"),
            },
            found,
        )
        best = {row["side"] == "phitune": row for row in reversed(found)}
        if len(best) == 2:
            ours, theirs = (best[side]["tokens_per_second"]["median"] for side in (True, False))
            peer = f"{best[False]['side']}, {best[False]['what']}"
            lines += [
                "",
                f"phitune does {ours / theirs:.2f} x the tokens/s of the best peer ({peer}).",
            ]
    return lines


def decode_table(rows: list[Row]) -> list[str]:
    copied = next((row["gb_per_second"] for row in rows if "gb_per_second" in row), None)

    def of(side: str) -> Cell:
        return lambda row: spread(side, ",.0f")(row["tokens_per_second"])

    def ratio(row: Row) -> str:
        found = row["tokens_per_second"]
        return f"{found['ours']['median'] / found['transformers']['median']:.2f}"

    def share(row: Row) -> str:
        if copied is None or row["sequences"] > 1:
            return ""
        return f"{row['tokens_per_second']['ours']['median'] * row['weight_gb'] / copied:.0%}"

    lines = [] if copied is None else [f"A copy reads and writes {copied:,.0f} GB/s.", ""]
    answers = [row for row in rows if row["what"] == "answers"]
    return lines + table(
        {
            "model": plain("model"),
            "sequences": plain("sequences"),
            "phitune": of("ours"),
            "not captured": of("ours, not captured"),
            "transformers": of("transformers"),
            "times transformers": ratio,
            "of the limit": share,
        },
        answers,
    )


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "gemm": gemm_table,
    "products": products_table,
    "profile": profile_table,
    "parity": parity_table,
    "saved_bytes": saved_table,
    "presets": presets_table,
    "planner": planner_table,
    "speed": speed_table,
    "decode": decode_table,
}
