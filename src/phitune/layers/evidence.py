"""What is known about where to put adapters, by whom, and what is only said.

The one place of these claims: the command and docs/phi-2.md and docs/phi-3.5.md are made from it.
A claim says no more than its source, and on which models it was measured; none of the papers
measured Phi.
"""

from dataclasses import dataclass
from typing import Literal

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
