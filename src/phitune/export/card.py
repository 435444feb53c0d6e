"""The model card: README.md of an adapter and of every export, in Markdown for people and the hub.

It states what the run directory records (data, settings, measurements) and how to load and prompt
the model. What is not recorded is left out, and so are paths of this machine. The licence is not
guessed: it follows from the base model's and from the data's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from phitune.data.coder import Coder
from phitune.data.dataset import Turn, hub_id
from phitune.data.tokenizer import TextTokenizer
from phitune.model.files import SHIPPED_MODELS, is_hub_id
from phitune.model.lora import CONFIG_FILE
from phitune.training.checkpoint import replace_file
from phitune.training.rundir import ADAPTER, CONFIG, EVALUATION, SUMMARY
from phitune.untrusted import read_object

CARD_FILE = "README.md"
# The settings that decide what was learnt; none of them is a path of this machine.
_SETTINGS = (
    "prompt_format",
    "train_on_prompt",
    "validation_split",
    "max_length",
    "epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "layers",
    "seed",
    "precision",
)


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter with what it was trained with, as far as a card states it."""

    model_name: str  # of the base, as the user or the adapter names it
    adapter_folder: Path
    coder: Coder
    run: Path | None  # the run directory, where the adapter lies in one


@dataclass(frozen=True)
class FormatWords:
    """What a card says about the format of its folder."""

    library: str | None  # in the hub's vocabulary
    what: str
    how: str  # to load it, in Markdown; {base} stands for the base model's name
    template: str = "The chat template beside this file"
    stops: str = ", as generation_config.json has it too"


_ADAPTER = FormatWords(
    "peft",
    "A LoRA adapter",
    """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```""",
)
_MERGED = FormatWords(
    "transformers",
    "A whole model, with a LoRA adapter merged into its weights",
    """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```""",
)
_GGUF = FormatWords(
    None,
    "A whole model for llama.cpp and Ollama, with a LoRA adapter merged into its weights",
    """```sh
llama-server -m {file} -c {context}{ollama}
```""",
    "The chat template in the file",
    ", as the file has it too",
)
_GGUF_LORA = FormatWords(
    None,
    "A LoRA adapter for llama.cpp, to be loaded on a file of its base",
    """```sh
llama-server -m BASE.gguf --lora {file} --chat-template-file chat_template.jinja -c {context}
```

BASE.gguf is a file of `{base}`. It has its own chat template and end token; the template beside
this file is the one that was trained.""",
    stops="",
)
FORMAT_WORDS = {
    "adapter": _ADAPTER,
    "merged": _MERGED,
    "gguf": _GGUF,
    "gguf-lora": _GGUF_LORA,
}


def write_adapter_card(run: Path, summary: Mapping[str, Any]) -> None:
    """Writes the card of a run's own adapter, whose summary is not written yet."""
    folder = run / ADAPTER
    name = str(read_object(folder / CONFIG_FILE, "").get("base_model_name_or_path"))
    adapter = TrainedAdapter(name, folder, Coder.as_saved(TextTokenizer(folder)), run)
    replace_file(folder / CARD_FILE, model_card(adapter, "adapter", summary=summary))


def write_card(
    adapter: TrainedAdapter, folder: Path, format_name: str, names: Mapping[str, str] | None = None
) -> None:
    """Writes the card of an export; see `model_card`."""
    (folder / CARD_FILE).write_text(model_card(adapter, format_name, names), encoding="utf-8")


def model_card(
    adapter: TrainedAdapter,
    format_name: str,
    names: Mapping[str, str] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> str:
    """A card in Markdown, with the front matter that the hub reads.

    Args:
        names: replaces names in braces in the format's `how`.
        summary: of the run; by default the one in its directory.
    """
    words, run = FORMAT_WORDS[format_name], adapter.run
    settings = _settings(run)
    summary = _object(run, SUMMARY) if summary is None else summary

    # A model of this machine is named by its last part.
    name = adapter.model_name
    is_public = name in SHIPPED_MODELS or is_hub_id(str(settings.get("model_name", name)))
    base = name if is_public else Path(name).name
    # Not the run's name: a run that is repeated elsewhere has the same card.
    title = f"{Path(base).name}, fine-tuned"
    if data := settings.get("dataset_path"):
        title += f" on {data if hub_id(data) else Path(data).name}"

    front: dict[str, Any] = {}
    if is_public:
        front["base_model"] = name
    if words.library:
        front["library_name"] = words.library
    front |= {"pipeline_tag": "text-generation", "tags": ["phitune", "lora", "text-generation"]}
    if data and (found := hub_id(data)):
        front["datasets"] = [found[0]]

    how = words.how
    for key, value in {"base": base, **(names or {})}.items():
        how = how.replace(f"{{{key}}}", value)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        f"{words.what}, fine-tuned from `{base}` with phitune.",
        "No licence is stated here: it follows from that of the base model and from your data."
        " On the hub, add `license:` to the head of this file.",
        f"## Loading\n\n{how}",
        _prompting(words, adapter.coder),
        _data(settings, summary),
        _table("Settings", ("setting", "value"), _chosen(settings, adapter.adapter_folder)),
        _measured(summary, _object(run, EVALUATION)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _prompting(words: FormatWords, coder: Coder) -> str:
    """The exact text of a prompt, and the tokens that end an answer."""
    turns = (Turn("user", "{prompt}"),)
    text = coder.text(turns)
    whole = coder.text((*turns, Turn("assistant", "{answer}")))
    tokenizer = coder.tokenizer
    names = {tokenizer.token_id(token): token for token in tokenizer.control_tokens}
    ends = " or ".join(f"`{names[token]}` ({token})" for token in coder.stop_ids)
    return (
        "## Prompting\n\n"
        f"{words.template} renders what the model was trained on. As JSON strings, the prompt,"
        " and the prompt with its answer:\n\n"
        f"```\n{_quoted(text)}\n{_quoted(whole)}\n```\n\n"
        f"An answer ends with {ends}{words.stops}. Tokenize the prompt"
        " without adding special tokens: the text contains all that it needs."
    )


def _data(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    facts: list[tuple[str, str]] = []
    if name := settings.get("dataset_path"):
        facts.append(("name", f"`{name if hub_id(name) else Path(name).name}`"))
    about = summary.get("data")
    if isinstance(about, Mapping):
        for key, value in about.items():
            if key == "files":
                facts += [(f"SHA-256 of `{file}`", f"`{digest}`") for file, digest in value.items()]
            else:
                facts.append((key.replace("_", " "), f"{value:,}"))
    return _table("Data", ("", ""), facts)


def _chosen(settings: Mapping[str, Any], adapter_folder: Path) -> list[tuple[str, str]]:
    if not settings:
        raw = read_object(adapter_folder / CONFIG_FILE, "")
        names = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
        settings = {ours: raw.get(theirs) for theirs, ours in names.items()}
        settings = {**settings, "target_modules": raw.get("target_modules")}
    return [
        (name, _shown(value)) for name in _SETTINGS if (value := settings.get(name)) is not None
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _measured(summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    facts: list[tuple[str, str]] = []
    first, best = (summary.get(f"{which}_validation_loss") for which in ("first", "best"))
    if isinstance(first, float) and isinstance(best, float):
        facts.append(("validation loss before", f"{first:.4f}"))
        facts.append(("validation loss after", f"{best:.4f}"))
    if "best_step" in summary:
        facts.append(("step of this adapter", f"{summary['best_step']} of {summary['steps']}"))
    if answers := summary.get("answers"):
        stopped = summary.get("answers_stopped_by_themselves")
        facts.append(
            ("sample answers that ended with a stop token", f"{stopped} of {len(answers)}")
        )
    text = _table("Measured", ("", ""), facts)
    measures = evaluation.get("measures")
    if isinstance(measures, Mapping) and measures:
        rows = [
            (name.replace("_", " "), _figure(measure.get("base")), _figure(measure.get("tuned")))
            for name, measure in measures.items()
        ]
        title = f"On {evaluation.get('rows_evaluated')} rows of the validation data"
        text += ("\n\n" if text else "## Measured\n\n") + f"{title}:\n\n"
        text += _rows(("", "base", "tuned"), rows)
    return text


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"## {title}\n\n{_rows(head, rows)}" if rows else ""


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _settings(run: Path | None) -> dict[str, Any]:
    if run is None or not (run / CONFIG).is_file():
        return {}
    content = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _object(run: Path | None, name: str) -> dict[str, Any]:
    return read_object(run / name, "") if run and (run / name).is_file() else {}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
