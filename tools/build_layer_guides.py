"""Makes docs/phi-2.md and docs/phi-3.5.md from the layer guide and the models' sizes.

    python tools/build_layer_guides.py [--configs FOLDER] [--out docs]

The words are those of `phitune layers` (src/phitune/assets/layers.yaml), the numbers are counted
from config.json: FOLDER/phi-2 and FOLDER/phi-3.5-mini-instruct, or the built-in figures without
--configs. tests/layers/test_guide.py holds the committed documents against this program.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from phitune.commands.layers import megabytes, shape_of, share_of
from phitune.config import Settings
from phitune.layers.guide import (
    FILE_BYTES,
    Goal,
    Guide,
    advice,
    choices,
    flags_of,
    goal_flags,
    kinds_of,
    total_parameters,
)
from phitune.model.architecture import EMBED_TOKENS, LM_HEAD, known_model_config, read_model_config

DOCS = Path(__file__).parents[1] / "docs"
MODELS = {
    "phi-2": ("phi-2", "microsoft/phi-2"),
    "phi-3.5": ("phi-3.5-mini-instruct", "microsoft/Phi-3.5-mini-instruct"),
}
RANKS = (8, 16, 32)
OTHER = {"phi-2": "phi-3.5", "phi-3.5": "phi-2"}
LAYOUT = {
    "phi": """\
    token -> embed_tokens -> layer 0 ... layer {last} -> final_layernorm -> lm_head -> scores

    a layer:  x -> input_layernorm -+-> q_proj k_proj v_proj -> attention -> dense -+
                                    |                                               +-> + x
                                    +-> fc1 -> GELU -> fc2 -------------------------+

Attention and MLP compute in parallel, from the same input. q_proj, k_proj, v_proj and fc1 read that
input, so phitune computes them as one product; each can still have an adapter of its own.""",
    "phi3": """\
    token -> embed_tokens -> layer 0 ... layer {last} -> norm -> lm_head -> scores

    a layer:  x -> input_layernorm -> qkv_proj -> attention -> o_proj -> + x = y
              y -> post_attention_layernorm -> gate_up_proj -> SwiGLU -> down_proj -> + y

Query, key and value are one matrix, and so are gate and up. An adapter on qkv_proj has one A for
all three: names such as q_proj or up_proj, common with other models, are refused with a hint.""",
}
MEASURING = """\
`phitune layers {model} --dataset_path DATA`
puts a fresh adapter on every linear layer, runs a few batches of your rows and shows how strongly
the loss pulls at each weight, as a table and as a map of layers and modules. It trains nothing and
writes nothing.

At its start an adapter adds B A to a weight W, with B = 0 and A random, so nothing changes yet. The
gradient of B is then the weight's own gradient G = dL/dW seen along the random rows of A:

    dL/dB = s G A^T          E ||dL/dB||^2 = s^2 R v ||G||^2

with s the scale, R the rank and v = 1 / (3 x inputs) the variance of A's entries. Divided by
s^2 R v it is an unbiased estimate of ||G||^2, for the whole weight, without a single gradient of a
weight. The measurement takes R = 32 whatever `--lora_r` says; its relative error is at most 25 % in
||G||^2, when G has one direction only, and a few per cent otherwise. Tests hold it against the
gradients that autograd finds.

- **gradient**: ||G||, the mean over batches and how far they spread. **of weight**: ||G|| / ||W||.
- **held**: a module's share of all ||G||^2. **agree**: whether the batches pull the same way.
- **Proposal**: the cheapest `--target_modules` and `--layers`, in parameters, that together hold
  80 % of ||G||^2 (`--share`), as a command to be copied.

It is an indication, not a proof. A gradient at the start says where the loss pulls first; what is
pulled least now may matter later, and weights that are small or close to the input tend to be
pulled hard whatever the data. [The benchmark](../benchmarks/results/layer_proposal.md) trains the
shipped models with the proposal, with everything, and with random choices of the same size."""


def document(name: str, model: str, guides: Sequence[Guide]) -> str:
    """One document, from the same model at each of the RANKS."""
    first, words = guides[0], advice()
    config = first.config
    modules = words.modules[config.model_type]
    parts = [
        f"# The layers of {model.partition('/')[2]}",
        f"What {model} is made of, what an adapter on each part costs, and which part to adapt for"
        f" which goal. The same in a terminal: `phitune layers {model}`; for your data:"
        f" `phitune layers {model} --dataset_path DATA`. See also [{OTHER[name]}]({OTHER[name]}.md)"
        " and [memory](memory.md).",
        "Made by `tools/build_layer_guides.py`; change the words in"
        " `src/phitune/assets/layers.yaml`.",
        "## Layers",
        LAYOUT[config.model_type].format(last=config.num_hidden_layers - 1),
        _kinds(guides),
        f"{total_parameters(config):,} parameters in all. Shapes are out x in. LoRA of rank r adds"
        " r x (in + out) parameters to a module, written in fp32 (MB are 10^6 bytes). Norms have no"
        " adapters.",
        "## What they do",
        "\n".join(f"- **{kind}**: {what}" for kind, what in modules.items()),
        "## What they cost",
        _costs(guides),
        "Presets: "
        + "; ".join(f"`{preset}`, {what}" for preset, what in words.presets.items())
        + ". Training is what the adapter, its gradients, copies and AdamW's moments take with a"
        " base in bf16; time is a step's in rows of 1,024 tokens, relative to all-linear, both"
        " counted as [memory](memory.md) says. Fewer modules save megabytes; time is saved by"
        " layers, because the backward pass ends at the lowest adapter.",
        _tables(first),
        "## What to adapt for which goal",
        _goals(first),
        *(_goal(first, goal) for goal in words.goals),
        "## Evidence and folklore",
        f"{words.no_phi} {'. '.join(f'**{mark}**: {what}' for mark, what in words.marks.items())}.",
        _claims(),
        "## Measuring your own data",
        MEASURING.format(model=model),
        "## Sources",
        "\n".join(
            f"- **{key}**: {source.who}, [{source.title}]({_link(source.url)})"
            for key, source in words.sources.items()
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _kinds(guides: Sequence[Guide]) -> str:
    config = guides[0].config
    rows = []
    for kind in kinds_of(config):
        parameters = kind.lora_parameters(RANKS[0])
        cost = f"{parameters:,} ({megabytes(FILE_BYTES * parameters)})" if kind.trainable else "-"
        row = [f"`{kind.name}`", shape_of(kind), str(kind.count), share_of(kind, config)]
        rows.append([*row, cost, kind.preset or "-"])
    heads = ("module", "shape", "number", "share", f"LoRA r {RANKS[0]} (file)", "preset")
    return _table(heads, rows, right=(2, 3, 4))


def _costs(guides: Sequence[Guide]) -> str:
    rows = []
    for targets, layers, _ in choices(guides[0]):
        prices = [guide.price(targets, layers) for guide in guides]
        rows.append(
            [
                f"`{flags_of(targets, layers).removeprefix('--target_modules ')}`",
                *(f"{price.parameters / 1e6:.2f} M" for price in prices),
                *(megabytes(price.file_bytes) for price in prices),
                megabytes(prices[0].memory_bytes),
                f"{prices[0].time:.2f}x",
            ]
        )
    ranks = [f"r {rank}" for rank in RANKS]
    heads = ("targets", *ranks, *(f"file, {rank}" for rank in ranks), "training, r 8", "time")
    return _table(heads, rows, right=range(1, len(heads)))


def _tables(guide: Guide) -> str:
    """What the token table and the head would cost, and what other tools make of it."""
    rank, whole = guide.rank, guide.config.vocab_size * guide.config.hidden_size * FILE_BYTES
    each = guide.price((EMBED_TOKENS,))
    both = guide.price((EMBED_TOKENS, LM_HEAD))
    return (
        f"`{EMBED_TOKENS}` or `{LM_HEAD}` adds {each.parameters:,} parameters or"
        f" {megabytes(each.file_bytes)} at r {rank}, both {megabytes(both.file_bytes)}: phitune"
        " puts LoRA on them. Tools that store such a table whole add"
        f" {megabytes(whole)} for each in fp32. Neither is part of a preset."
    )


def _goals(guide: Guide) -> str:
    rows = []
    for goal in advice().goals:
        price = guide.goal_price(goal)
        rows.append(
            [
                f"[{goal.name}](#{goal.name.replace(' ', '-')})",
                f"`{goal_flags(guide, goal)}`",
                f"{price.parameters / 1e6:.2f} M",
                megabytes(price.file_bytes),
                f"{price.time:.2f}x",
            ]
        )
    heads = ("goal", "flags", f"r {guide.rank}", "file", "time")
    return _table(heads, rows, right=(2, 3, 4))


def _goal(guide: Guide, goal: Goal) -> str:
    rests = ", ".join(f"{key} ({advice().claims[key].mark})" for key in goal.claims)
    return (
        f"### {goal.name}\n\n{goal.what[0].upper()}{goal.what[1:]}.\n\n"
        f"    phitune train --model_name {guide.settings.model_name} {goal_flags(guide, goal)}\n\n"
        f"{goal.why}\n\nRests on {rests}."
    )


def _claims() -> str:
    rows = [
        [key, claim.text, claim.mark, ", ".join(claim.sources) or "-"]
        for mark in advice().marks
        for key, claim in advice().claims.items()
        if claim.mark == mark
    ]
    return _table(("name", "claim", "", "sources"), rows)


def _link(url: str) -> str:
    return url if url.startswith("https://") else f"../{url}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    to_the_right = set(right)
    ruler = ["---:" if index in to_the_right else "---" for index in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ruler, *rows))


def build(configs: Path | None, out: Path) -> list[Path]:
    """Writes both documents; returns their paths."""
    written = []
    for name, (folder, model) in MODELS.items():
        config = read_model_config(configs / folder) if configs else known_model_config(model)
        assert config
        guides = [
            Guide(Settings(model_name=model, lora_r=rank), config, "", None) for rank in RANKS
        ]
        path = out / f"{name}.md"
        path.write_text(document(name, model, guides), encoding="utf-8")
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=Path, help="folder with a folder for each model")
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    for path in build(arguments.configs, arguments.out):
        print(path)


if __name__ == "__main__":
    main()
