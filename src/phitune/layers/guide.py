"""The layer guide: what each kind of layer does, and which to adapt for which goal.

The one place of its words; `evidence.py` has the claims and their sources, `anatomy.py` the
numbers.
A goal's advice is a starting point: the claims beside it say what it rests on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from phitune.config import Resolved, Settings
from phitune.model.architecture import (
    EMBED_TOKENS,
    FAMILIES,
    LM_HEAD,
    ModelConfig,
    known_model_config,
    layer_linears,
    read_model_config,
)
from phitune.model.files import cached_model, find_model
from phitune.model.targets import EMBEDDING_MODULE, resolve_targets
from phitune.plan.memory import Base, Shape, plan_memory
from phitune.plan.plan import Rows, assumed_rows, token_cost

# -------------------------------------------------------------------------------------------------
# What a model is made of, counted from its config.json, and what an adapter on a part of it costs.
#
# No torch, no weights: sizes only. Memory and time are asked of `planning` and
# `training/memory.py`, so that this guide and `phitune plan` cannot disagree.

# save_adapter writes fp32.
FILE_BYTES = 4
# Times are compared in rows of this length where there are no data to ask.
ASSUMED_LENGTH = 1024
# FLOPs a token of an adapter of p parameters: forward 2p, and 2p each for the gradients of its
# matrices and for what goes on to the layer below.
_FLOPS_PER_PARAMETER = 6


@dataclass(frozen=True)
class Kind:
    """All modules of one name."""

    name: str  # as in --target_modules; norms by their own name
    shape: tuple[int, ...]  # of the weight, (out, in) as in the file
    bias: bool
    count: int  # how many the model has
    preset: str  # attention, mlp, or "" where none holds it
    trainable: bool  # whether it may be a target

    @property
    def weights(self) -> int:
        """Parameters of all of them; 0 for a head that is the token table itself."""
        size = 1
        for length in self.shape:
            size *= length
        return self.count * (size + (self.shape[0] if self.bias else 0))

    def lora_parameters(self, rank: int) -> int:
        """What LoRA on all of them adds: r x (in + out) each, or nothing where it cannot sit."""
        if not self.trainable:
            return 0
        return max(self.count, 1) * rank * sum(self.shape)


def kinds_of(config: ModelConfig) -> list[Kind]:
    """Every kind of layer, in the order of the computation."""
    family, layers = FAMILIES[config.model_type], config.num_hidden_layers
    hidden, vocabulary = config.hidden_size, config.vocab_size
    found = [Kind(EMBED_TOKENS, (vocabulary, hidden), False, 1, "", True)]
    found.append(Kind(family.norms[0], (hidden,), family.norm_bias, layers, "", False))
    by_name = {}
    for spec in layer_linears(config).values():
        for part, out_features in spec.parts:
            name = part.rsplit(".", 1)[-1]
            preset = "attention" if name in family.attention else "mlp"
            by_name[name] = Kind(
                name, (out_features, spec.in_features), spec.bias, layers, preset, True
            )
    found += [by_name[name] for name in family.attention]
    found += [
        Kind(name, (hidden,), family.norm_bias, layers, "", False) for name in family.norms[1:]
    ]
    found += [by_name[name] for name in family.mlp]
    final = family.final_norm.rsplit(".", 1)[-1]
    found.append(Kind(final, (hidden,), family.norm_bias, 1, "", False))
    own_head = 0 if config.tie_word_embeddings else 1
    found.append(Kind(LM_HEAD, (vocabulary, hidden), family.lm_head_bias, own_head, "", True))
    return found


def total_parameters(config: ModelConfig) -> int:
    """Of the whole model."""
    return sum(kind.weights for kind in kinds_of(config))


def module_shape(config: ModelConfig, module: str) -> tuple[int, int]:
    """(out, in) of a module by its full name; of the token table (vocabulary, hidden)."""
    if module in (EMBEDDING_MODULE, LM_HEAD):
        return config.vocab_size, config.hidden_size
    for spec in layer_linears(config).values():
        for part, out_features in spec.parts:
            if module.endswith("." + part):
                return out_features, spec.in_features
    raise KeyError(module)


@dataclass(frozen=True)
class Price:
    """What an adapter on some modules costs."""

    modules: int
    parameters: int
    file_bytes: int  # adapter_model.safetensors, without the few KB of its header
    memory_bytes: int  # in training: the adapter, its gradients, copies and moments
    time: float  # of a step, relative to all-linear in all layers
    adapter_time: float  # the adapter's own part of that


def price_of(
    config: ModelConfig,
    modules: Sequence[str],
    rank: int,
    *,
    base: Base = "bf16",
    rows: Rows | None = None,
) -> Price:
    """Parameters, file, memory and time of LoRA of this rank on these modules.

    The memory is the part of a plan that no row changes. That the backward ends at the lowest
    adapter is in the time, not in the memory.
    """
    rows = rows or assumed_rows(ASSUMED_LENGTH, 1)
    everything = resolve_targets(config, ["all-linear"], None)
    parameters = sum(_parameters(config, module, rank) for module in modules)
    step = token_cost(config, everything, rows).step + _adapter_flops(
        config, everything, rank, rows
    )
    own = _adapter_flops(config, modules, rank, rows)
    return Price(
        len(modules),
        parameters,
        parameters * FILE_BYTES,
        _fixed_bytes(config, modules, rank, base) - _fixed_bytes(config, (), rank, base),
        (token_cost(config, modules, rows).step + own) / step,
        own / step,
    )


def _parameters(config: ModelConfig, module: str, rank: int) -> int:
    return rank * sum(module_shape(config, module))


def _fixed_bytes(config: ModelConfig, modules: Sequence[str], rank: int, base: Base) -> int:
    plan = plan_memory(config, modules, rank, base, Shape((1,), 1), 0)
    fixed = ("weights", "adapter", "optimizer")
    return sum(term.bytes for term in plan.terms if term.name in fixed)


def _adapter_flops(config: ModelConfig, modules: Sequence[str], rank: int, rows: Rows) -> float:
    """The adapter's own, of a training token; `token_cost` leaves them out."""
    total = 0.0
    for module in modules:
        parameters = float(_parameters(config, module, rank))
        if module == LM_HEAD:
            parameters *= rows.trained_share  # The head runs on no other position.
        elif module == EMBEDDING_MODULE:
            parameters = rank * config.hidden_size  # A column of A is looked up, not multiplied.
        total += _FLOPS_PER_PARAMETER * parameters
    return total


def short_name(module: str) -> str:
    """The name that --target_modules takes."""
    return module.rsplit(".", 1)[-1]


def layer_of(module: str) -> int | None:
    """The layer of a module by its full name; None for the token table and the head."""
    return int(module.split(".")[2]) if ".layers." in module else None


# -------------------------------------------------------------------------------------------------
# What is known about where to put adapters, by whom, and what is only said.
#
# The one place of these claims: the command and docs/phi-2.md and docs/phi-3.5.md are made from
# it. A claim says no more than its source, and on which models it was measured; none of the papers
# measured Phi.

# measured: an experiment of the named source. reported: users or makers of tools say it worked for
# them. folklore: often repeated, with no experiment behind it that we know of.
Mark = Literal["measured", "reported", "folklore"]
MARKS: dict[Mark, str] = {
    "measured": "an experiment of the named source, on its models and data",
    "reported": "users or makers of tools say it worked for them",
    "folklore": "often repeated; we know of no experiment that shows it",
}


@dataclass(frozen=True)
class Source:
    """Where a claim comes from."""

    who: str
    title: str
    url: str


SOURCES = {
    "lora": Source(
        "Hu et al. 2021",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "https://arxiv.org/abs/2106.09685",
    ),
    "qlora": Source(
        "Dettmers et al. 2023",
        "QLoRA: Efficient Finetuning of Quantized LLMs",
        "https://arxiv.org/abs/2305.14314",
    ),
    "less": Source(
        "Biderman et al. 2024",
        "LoRA Learns Less and Forgets Less",
        "https://arxiv.org/abs/2405.09673",
    ),
    "regret": Source(
        "Schulman et al. 2025",
        "LoRA Without Regret (Thinking Machines Lab)",
        "https://thinkingmachines.ai/blog/lora/",
    ),
    "adalora": Source(
        "Zhang et al. 2023",
        "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (AdaLoRA)",
        "https://arxiv.org/abs/2303.10512",
    ),
    "l1ra": Source(
        "L1RA, 2025",
        "L1RA: Dynamic Rank Assignment in LoRA Fine-Tuning",
        "https://arxiv.org/abs/2509.04884",
    ),
    "rslora": Source(
        "Kalajdzievski 2023",
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        "https://arxiv.org/abs/2312.03732",
    ),
    "lora-ga": Source(
        "Wang et al. 2024",
        "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        "https://arxiv.org/abs/2407.05000",
    ),
    "memories": Source(
        "Geva et al. 2021",
        "Transformer Feed-Forward Layers Are Key-Value Memories",
        "https://arxiv.org/abs/2012.14913",
    ),
    "recall": Source(
        "Geva et al. 2023",
        "Dissecting Recall of Factual Associations in Auto-Regressive Language Models",
        "https://arxiv.org/abs/2304.14767",
    ),
    "rome": Source(
        "Meng et al. 2022",
        "Locating and Editing Factual Associations in GPT (ROME)",
        "https://arxiv.org/abs/2202.05262",
    ),
    "localization": Source(
        "Hase et al. 2023",
        "Does Localization Inform Editing?",
        "https://arxiv.org/abs/2301.04213",
    ),
    "evidence": Source(
        "Wang and Veitch 2025",
        "Does Editing Provide Evidence for Localization?",
        "https://arxiv.org/abs/2502.11447",
    ),
    "architectures": Source(
        "Choe et al. 2025",
        "Do All Autoregressive Transformers Remember Facts the Same Way?",
        "https://arxiv.org/abs/2509.08778",
    ),
    "induction": Source(
        "Olsson et al. 2022",
        "In-context Learning and Induction Heads",
        "https://arxiv.org/abs/2209.11895",
    ),
    "knowledge": Source(
        "Gekhman et al. 2024",
        "Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?",
        "https://arxiv.org/abs/2405.05904",
    ),
    "lima": Source(
        "Zhou et al. 2023", "LIMA: Less Is More for Alignment", "https://arxiv.org/abs/2305.11206"
    ),
    "unlocking": Source(
        "Lin et al. 2023",
        "The Unlocking Spell on Base LLMs",
        "https://arxiv.org/abs/2312.01552",
    ),
    "limits": Source(
        "Ghosh et al. 2024",
        "A Closer Look at the Limitations of Instruction Tuning",
        "https://arxiv.org/abs/2402.05119",
    ),
    "persona": Source(
        "Chen et al. 2025",
        "Persona Vectors: Monitoring and Controlling Character Traits in Language Models",
        "https://arxiv.org/abs/2507.21509",
    ),
    "unsloth": Source(
        "Unsloth", "Continued Pretraining", "https://unsloth.ai/blog/contpretraining"
    ),
    "unsloth-size": Source(
        "unsloth#1093",
        "Lora adapter is almost as large as model",
        "https://github.com/unslothai/unsloth/issues/1093",
    ),
    "peft": Source(
        "PEFT",
        "LoRA developer guide",
        "https://huggingface.co/docs/peft/developer_guides/lora",
    ),
    "peft-phi": Source(
        "peft#1375",
        "Fix LoRA module mapping for Phi models",
        "https://github.com/huggingface/peft/pull/1375",
    ),
    "tokens": Source(
        "PEFT",
        "Trainable Tokens",
        "https://huggingface.co/docs/peft/package_reference/trainable_tokens",
    ),
    "here": Source(
        "phitune",
        "benchmarks/layer_proposal.py, on the shipped models",
        "benchmarks/results/layer_proposal.md",
    ),
}


@dataclass(frozen=True)
class Claim:
    """One sentence, how well it is founded, and the keys of its sources in `SOURCES`."""

    text: str
    mark: Mark
    sources: tuple[str, ...] = ()


CLAIMS = {
    "all-linear": Claim(
        "With adapters on query and value alone full fine-tuning was not matched; with adapters on"
        " all linear layers of the blocks it was, and the rank did not matter (LLaMA 7B on Alpaca)",
        "measured",
        ("qlora",),
    ),
    "mlp-over-attention": Claim(
        "Adapters on attention alone did clearly worse than on the MLP alone, at the same number of"
        " parameters too, and added nothing to those on the MLP (Llama-3.1-8B and a Qwen3 MoE)",
        "measured",
        ("regret",),
    ),
    "mlp-alone": Claim(
        "Trained one matrix at a time on MNLI, those of the MLP gave more than query and key",
        "measured",
        ("adalora",),
    ),
    "l1ra": Claim(
        "Where ranks may wander during training, they went to the MLP and to attention's output",
        "measured",
        ("l1ra",),
    ),
    "query-value": Claim(
        "At the same number of parameters query and value together beat query or key alone, and a"
        " small rank on more matrices beats a large one on one (GPT-3 175B, attention only, WikiSQL"
        " and MultiNLI)",
        "measured",
        ("lora",),
    ),
    "peft-default": Claim(
        "PEFT's own default for Phi-2 is q_proj, v_proj, fc1 and fc2",
        "reported",
        ("peft-phi",),
    ),
    "peft-all-linear": Claim(
        "PEFT's guide takes all linear layers for training in QLoRA's way, the head left out",
        "reported",
        ("peft",),
    ),
    "learns-less": Claim(
        "On code and mathematics LoRA of common ranks learnt less than full fine-tuning, and forgot"
        " less of what lay outside (Llama-2-7B)",
        "measured",
        ("less",),
    ),
    "matches-full": Claim(
        "On data of post-training size LoRA on all layers matched full fine-tuning until its rank"
        " was too small for what there was to learn",
        "measured",
        ("regret",),
    ),
    "rank-scale": Claim(
        "With alpha / r an adapter's gradient shrinks as the rank grows; alpha has to grow with it"
        " (phitune warns outside of 2 to 4 x r)",
        "measured",
        ("rslora",),
    ),
    "new-facts": Claim(
        "Facts that the model did not know were learnt slower than others, and once learnt raised"
        " its invention of facts it had known; stopping early held that down",
        "measured",
        ("knowledge",),
    ),
    "memories": Claim(
        "MLP layers act as memories: the first matrix recognises patterns in the text, the second"
        " answers each with likely next words; shallow patterns in lower layers, meaning in upper"
        " ones (a 16-layer model trained on WikiText-103)",
        "measured",
        ("memories",),
    ),
    "middle-facts": Claim(
        "What decides a fact's recall are MLPs of the middle layers at the subject's last word, and"
        " editing the second matrix of one changes the fact (GPT-2 XL, GPT-J)",
        "measured",
        ("rome",),
    ),
    "attention-extracts": Claim(
        "Facts are then read out by attention heads of upper layers, which hold part of them too",
        "measured",
        ("recall",),
    ),
    "localization": Claim(
        "Where a fact is located does not tell which layer is best to edit, and edits at random"
        " places can work as well",
        "measured",
        ("localization", "evidence"),
    ),
    "architectures": Claim(
        "Which layers recall facts differs between architectures (Qwen: attention of the first)",
        "measured",
        ("architectures",),
    ),
    "induction": Claim(
        "Pairs of attention heads find an earlier occurrence of what is being written and copy what"
        " followed it; they appear when a model learns to learn from its context",
        "measured",
        ("induction",),
    ),
    "few-examples": Claim(
        "1,000 careful examples taught a 65B model the form of its answers; the authors take"
        " knowledge to come from pretraining almost entirely",
        "measured",
        ("lima",),
    ),
    "style-tokens": Claim(
        "Models before and after alignment agree at most positions; they differ mostly in words of"
        " style",
        "measured",
        ("unlocking",),
    ),
    "style-not-knowledge": Claim(
        "Instruction tuning with LoRA changed how answers begin and sound, and added little"
        " knowledge",
        "measured",
        ("limits",),
    ),
    "persona-direction": Claim(
        "Traits of character are directions in a model's activations, and fine-tuning moves along"
        " them, wanted or not",
        "measured",
        ("persona",),
    ),
    "tables": Claim(
        "For a new language or a domain with words of its own, train embed_tokens and lm_head too,"
        " at a learning rate 2 to 10 times lower",
        "reported",
        ("unsloth",),
    ),
    "tables-whole": Claim(
        "Other tools store these tables whole, which makes adapters of gigabytes; phitune puts LoRA"
        " on them, which is small and learns less",
        "reported",
        ("unsloth-size",),
    ),
    "token-rows": Claim(
        "Training a few rows of the token table takes less memory and disk than the whole of it"
        " (about 4 GiB of GPU memory on gemma-2-2b, by a preliminary benchmark)",
        "measured",
        ("tokens",),
    ),
    "captain": Claim(
        "On the captain example choices by the gradient at the start beat random ones of the same"
        " size, and all-linear beat every choice (models of 2 M parameters, one seed, six epochs)",
        "measured",
        ("here",),
    ),
    "captain-halves": Claim(
        "On the captain example the lower half of the layers learnt more than the upper half (the"
        " same runs)",
        "measured",
        ("here",),
    ),
    "gradient-start": Claim(
        "Adapters that start along the gradient of the base model learn faster, so that gradient"
        " says something (T5-Base, Llama 2-7B)",
        "measured",
        ("lora-ga",),
    ),
    "fact-words": Claim(
        "'fc2 stores the facts, so train only fc2': seen in edits, never shown for fine-tuning",
        "folklore",
    ),
    "upper-style": Claim(
        "'Upper layers are style, lower layers are grammar': fits what MLPs of upper layers answer"
        " with, but was not shown for fine-tuning",
        "folklore",
    ),
    "query-focus": Claim(
        "'Train query and key to change what the model looks at': true as arithmetic, not known to"
        " be a better way to train it",
        "folklore",
    ),
    "format-attention": Claim(
        "'Attention is enough for a format': copying is attention's work, but nobody compared",
        "folklore",
    ),
    "head-fluency": Claim(
        "'Adapt lm_head for better wording': no experiment with LoRA that we know of",
        "folklore",
    ),
    "reasoning-layers": Claim(
        "'Reasoning is in the middle layers': no experiment says which layers to adapt for it",
        "folklore",
    ),
}


# -------------------------------------------------------------------------------------------------

# Layers by where they are, so that the advice holds for a model of any depth.
Depth = Literal["all", "middle", "upper"]


@dataclass(frozen=True)
class Goal:
    """What somebody wants, and where to put the adapters for it."""

    name: str
    what: str  # in plain words
    targets: Mapping[str, tuple[str, ...]]  # by model_type, as --target_modules takes them
    depth: Depth
    why: str
    claims: tuple[str, ...]  # keys of `evidence.CLAIMS`, those for it first

    def layers(self, config: ModelConfig) -> str | None:
        """As --layers takes them; None for all."""
        return layers_at(config, self.depth)


def layers_at(config: ModelConfig, depth: Depth) -> str | None:
    """The middle half or the upper half of the layers; None for all of them."""
    count = config.num_hidden_layers
    if depth == "all" or count < 2:
        return None
    if depth == "upper":
        return f"{count // 2}-{count - 1}"
    return f"{count // 4}-{max(count // 4, count - count // 4 - 1)}"


_QKV = "decides what each token looks at (query and key) and what it takes from there (value)"
WORDS: Mapping[str, Mapping[str, str]] = {
    "phi": {
        EMBED_TOKENS: "The token table: the vector that each token enters with. Only tokens that"
        " occur are touched.",
        "input_layernorm": "Brings each token's vector to one scale before the layer reads it."
        " Phi-2 has one for attention and MLP alike. Stays frozen.",
        "q_proj": "What a token looks for in the tokens before it.",
        "k_proj": "What a token offers to those that look for something; together with q_proj it"
        " decides who looks at whom.",
        "v_proj": "What is taken over from a token that is looked at.",
        "dense": "Attention's output: mixes what the heads took over back into the token's vector.",
        "fc1": "The MLP's first matrix: thousands of detectors for patterns in what the token has"
        " become. Works beside attention, on the same input.",
        "fc2": "The MLP's second matrix: what each detected pattern adds to the token's vector.",
        "final_layernorm": "The same norm once more, before the head. Stays frozen.",
        LM_HEAD: "Turns the last vector into a score for every token of the vocabulary.",
    },
    "phi3": {
        EMBED_TOKENS: "The token table: the vector that each token enters with. Only tokens that"
        " occur are touched.",
        "input_layernorm": "Brings each token's vector to one scale before attention reads it."
        " Stays frozen.",
        "qkv_proj": f"Query, key and value in one matrix: {_QKV}. One adapter serves all three, so"
        " q_proj and v_proj cannot be chosen apart.",
        "o_proj": "Attention's output: mixes what the heads took over back into the token's"
        " vector.",
        "post_attention_layernorm": "The same before the MLP. Stays frozen.",
        "gate_up_proj": "The MLP's first matrix, in two halves: 'up' computes thousands of"
        " patterns, 'gate' says how much each counts.",
        "down_proj": "The MLP's second matrix: what each pattern adds to the token's vector.",
        "norm": "The same norm once more, before the head. Stays frozen.",
        LM_HEAD: "Turns the last vector into a score for every token of the vocabulary.",
    },
}
PRESETS: Mapping[str, str] = {
    "attention": "all matrices of attention",
    "mlp": "all matrices of the MLP",
    "all-linear": "both, in every layer: the default, and the best founded choice",
}


def _both(*targets: str) -> Mapping[str, tuple[str, ...]]:
    return {"phi": targets, "phi3": targets}


GOALS = (
    Goal(
        "attention focus",
        "what the model looks at in a prompt: the question rather than the small talk, the last"
        " instruction rather than the first",
        {"phi": ("q_proj", "k_proj", "v_proj"), "phi3": ("qkv_proj",)},
        "all",
        "These matrices are attention's choice. Value is among them because query and key without"
        " it were measured to be weaker than query and value.",
        ("query-value", "mlp-over-attention", "query-focus"),
    ),
    Goal(
        "new concepts",
        "ideas that connect much of what the model knows: a method, a taxonomy, a house style of"
        " thinking",
        _both("all-linear"),
        "all",
        "A concept has to be recognised, related and worded; nothing says that fewer layers do.",
        ("all-linear", "mlp-over-attention", "matches-full"),
    ),
    Goal(
        "new knowledge",
        "facts that the model never saw",
        _both("mlp"),
        "all",
        "MLPs hold most of what is stored, and alone they did as well as all layers. Take a larger"
        " rank where there is much to learn, and keep early stopping on.",
        ("memories", "mlp-over-attention", "learns-less", "new-facts"),
    ),
    Goal(
        "fixing facts",
        "a few known facts that should read otherwise",
        {"phi": ("fc2",), "phi3": ("down_proj",)},
        "middle",
        "The second MLP matrix of middle layers is where edits were made. LoRA is no edit: keep"
        " rows in the data that must stay as they are, and check them afterwards.",
        ("middle-facts", "localization", "architectures", "attention-extracts", "fact-words"),
    ),
    Goal(
        "fluency",
        "wording that sounds natural, in the register you want",
        _both("all-linear"),
        "all",
        "That upper layers are enough for wording is folklore. They save time, because the backward"
        " ends at the lowest adapter; where we measured it, they learnt less than lower ones.",
        ("style-tokens", "style-not-knowledge", "captain-halves", "upper-style", "head-fluency"),
    ),
    Goal(
        "domain vocabulary",
        "words, abbreviations or a language that the tokenizer cuts into many pieces",
        _both("all-linear", EMBED_TOKENS, LM_HEAD),
        "all",
        "Try all-linear alone first. Take the tables only where rare tokens matter, at half the"
        " learning rate or less. Training a few whole rows of the table is another way, which"
        " phitune does not have.",
        ("tables", "tables-whole", "token-rows", "all-linear"),
    ),
    Goal(
        "reasoning",
        "answers in steps: mathematics, code, plans",
        _both("all-linear"),
        "all",
        "Nothing shows that fewer layers do; what was measured on mathematics used all of them.",
        ("all-linear", "learns-less", "matches-full", "reasoning-layers"),
    ),
    Goal(
        "structured output",
        "JSON, tables, a fixed form",
        _both("attention"),
        "all",
        "A form is learnt from few examples, and copying keys and names is attention's work. If the"
        " form still breaks, take all-linear.",
        ("few-examples", "induction", "mlp-over-attention", "format-attention"),
    ),
    Goal(
        "persona",
        "a voice, a character, a habit of speech",
        _both("all-linear"),
        "all",
        "Style is learnt from few examples. In which layers is not known; on the shipped example, a"
        " sea captain, all of them learnt fastest.",
        (
            "few-examples",
            "style-not-knowledge",
            "persona-direction",
            "captain",
            "captain-halves",
            "upper-style",
        ),
    ),
)


# -------------------------------------------------------------------------------------------------
# The answer of `phitune layers` without data: a model, a rank, and what everything costs.
#
# From config.json alone; `view.py` shows it, tools/build_layer_guides.py makes the documents of
# it.


@dataclass(frozen=True)
class Guide:
    """What the command shows: a model, a rank, and the targets that were asked for, if any."""

    settings: Settings
    config: ModelConfig
    figures: str  # where the sizes come from, in words
    asked: tuple[str, ...] | None  # full names, where --target_modules or --layers were given

    @property
    def rank(self) -> int:
        return self.settings.lora_r

    def price(self, targets: Sequence[str], layers: str | None = None) -> Price:
        return price_of(self.config, resolve_targets(self.config, targets, layers), self.rank)

    def goal_targets(self, goal: Goal) -> tuple[str, ...]:
        return goal.targets[self.config.model_type]

    def goal_price(self, goal: Goal) -> Price:
        return self.price(self.goal_targets(goal), goal.layers(self.config))


def guide_of(resolved: Resolved) -> Guide:
    """The guide to a model. A well-known one needs no files: its sizes are built in.

    Raises:
        PhituneError: there is no such model, or it has no such modules or layers.
    """
    settings = resolved.settings
    name = settings.model_name
    known = None if Path(name).expanduser().is_dir() else known_model_config(name)
    folder = cached_model(name) if known else find_model(name)
    if folder:
        config, figures = read_model_config(folder), "figures from its config.json"
    else:
        assert known
        config = known
        figures = "built-in figures (its config.json is not in the local cache)"
    modules = resolve_targets(config, settings.target_modules, settings.layers)
    asks = any(resolved.origins[key] != "default" for key in ("target_modules", "layers"))
    return Guide(settings, config, figures, modules if asks else None)


def choices(guide: Guide) -> list[tuple[tuple[str, ...], str | None, str]]:
    """Presets, the upper half of the layers, and what the tables add."""
    upper = layers_at(guide.config, "upper")
    everything = ("all-linear",)
    return [
        (("attention",), None, ""),
        (("mlp",), None, ""),
        (everything, None, "default"),
        (everything, upper, "upper half"),
        ((*everything, EMBED_TOKENS), None, ""),
        ((*everything, LM_HEAD), None, ""),
    ]


def goal_flags(guide: Guide, goal: Goal) -> str:
    """The flags of a goal, as they are typed."""
    return flags_of(guide.goal_targets(goal), goal.layers(guide.config))


def flags_of(targets: Sequence[str], layers: str | None) -> str:
    """--target_modules and, where not all are meant, --layers."""
    flags = f"--target_modules {' '.join(targets)}"
    return f"{flags} --layers {layers}" if layers else flags


def as_json(guide: Guide) -> dict[str, Any]:
    """The whole guide in plain types, for `--json`; memory in bytes."""
    config = guide.config
    return {
        "model": {
            "name": guide.settings.model_name,
            "figures": guide.figures,
            "model_type": config.model_type,
            "num_hidden_layers": config.num_hidden_layers,
            "parameters": total_parameters(config),
        },
        "lora_r": guide.rank,
        "kinds": [
            {
                **asdict(kind),
                "weights": kind.weights,
                "share": kind.weights / total_parameters(config),
                "lora_parameters": kind.lora_parameters(guide.rank),
                "adapter_bytes": FILE_BYTES * kind.lora_parameters(guide.rank),
                "what": WORDS[config.model_type][kind.name],
            }
            for kind in kinds_of(config)
        ],
        "choices": [
            {"target_modules": targets, "layers": layers, **asdict(guide.price(targets, layers))}
            for targets, layers, _ in choices(guide)
        ],
        "asked": None
        if guide.asked is None
        else {"modules": guide.asked, **asdict(price_of(config, guide.asked, guide.rank))},
        "goals": [
            {
                "goal": goal.name,
                "what": goal.what,
                "target_modules": guide.goal_targets(goal),
                "layers": goal.layers(config),
                **asdict(guide.goal_price(goal)),
                "why": goal.why,
                "claims": goal.claims,
            }
            for goal in GOALS
        ],
        "claims": {key: asdict(claim) for key, claim in CLAIMS.items()},
        "sources": {key: asdict(source) for key, source in SOURCES.items()},
    }
