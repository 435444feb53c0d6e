"""The layer guide: what each kind of layer does, and which to adapt for which goal.

The one place of its words; `evidence.py` has the claims and their sources, `anatomy.py` the
numbers.
A goal's advice is a starting point: the claims beside it say what it rests on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from phitune.model.architecture import EMBED_TOKENS, LM_HEAD, ModelConfig

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
