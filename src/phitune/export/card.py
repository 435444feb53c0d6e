"""The model card: README.md of an adapter and of every export, in Markdown for people and the hub.

It states what the run directory records (data, settings, measurements) and how to load and prompt
the model. What is not recorded is left out, and so are paths of this machine. The licence is not
guessed: it follows from the base model's and from the data's. The text is the template
assets/card.md.j2; here is what it shows.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.sources import hub_id
from phitune.data.tokenizer import TextTokenizer
from phitune.inference.loaded import CARD_FILE, trained_on_conversations
from phitune.model.adapter_config import CONFIG_FILE
from phitune.model.files import SHIPPED_MODELS, is_hub_id
from phitune.model.lora import WEIGHTS_FILE
from phitune.text import ODD_BYTES
from phitune.training.checkpoint import replace_file
from phitune.training.rundir import ADAPTER, CONFIG, EVALUATION, SUMMARY
from phitune.untrusted import read_object

# From this share of the training rows on, a model is said to be trained on conversations.
_SHARE_OF_CONVERSATIONS = 0.1
# In the hub's vocabulary; it has no word for llama.cpp.
_LIBRARIES = {"adapter": "peft", "merged": "transformers"}
# The settings that decide what was learnt; none of them is a path of this machine.
_SETTINGS = (
    "prompt_format",
    "train_on_prompt",
    "validation_split",
    "max_length",
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "lora_r",
    "lora_alpha",
    "use_rslora",
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
class GgufFile:
    """What a card states about a llama.cpp file."""

    file: str  # its name
    context: int  # tokens that it is safe to run with
    ollama: bool = False  # a Modelfile lies beside it


def write_adapter_card(run: Path, summary: Mapping[str, Any]) -> None:
    """Writes the card of a run's own adapter, whose summary is not written yet."""
    folder = run / ADAPTER
    name = str(read_object(folder / CONFIG_FILE, "").get("base_model_name_or_path"))
    adapter = TrainedAdapter(name, folder, Coder.as_saved(TextTokenizer(folder)), run)
    replace_file(folder / CARD_FILE, _card(adapter, "adapter", summary))


def write_card(
    adapter: TrainedAdapter, folder: Path, format_name: str, gguf: GgufFile | None = None
) -> None:
    """Writes the card of an export.

    Args:
        gguf: the file, where the format is one of llama.cpp's.
    """
    card = _card(adapter, format_name, _object(adapter.run, SUMMARY), gguf)
    (folder / CARD_FILE).write_text(card, encoding="utf-8", errors=ODD_BYTES)


def _card(
    adapter: TrainedAdapter,
    format_name: str,
    summary: Mapping[str, Any],
    gguf: GgufFile | None = None,
) -> str:
    """A card in Markdown, with the front matter that the hub reads."""
    settings, evaluation = _settings(adapter.run), _object(adapter.run, EVALUATION)
    # Models and data of this machine are named by their last part. The run's name is not used: a
    # run that is repeated elsewhere has the same card.
    name = adapter.model_name
    is_public = name in SHIPPED_MODELS or is_hub_id(str(settings.get("model_name", name)))
    base = name if is_public else Path(name).name
    data = settings.get("dataset_path")
    data_id = hub_id(data) if data else None

    front: dict[str, Any] = {"base_model": name} if is_public else {}
    if library := _LIBRARIES.get(format_name):
        front["library_name"] = library
    front |= {"pipeline_tag": "text-generation", "tags": ["phitune", "lora", "text-generation"]}
    if data_id:
        front["datasets"] = [data_id[0]]
    if (conversations := _conversations(adapter, summary)) is not None:
        front["conversations"] = conversations

    coder, turns = adapter.coder, (Turn("user", "{prompt}"), Turn("assistant", "{answer}"))
    tokens = {coder.tokenizer.token_id(token): token for token in coder.tokenizer.control_tokens}
    data_name = (data if data_id else Path(data).name) if data else None
    return _template().render(
        format=format_name,
        gguf=gguf,
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        base=base,
        base_title=Path(base).name,
        data_name=data_name,
        prompt=_quoted(coder.text(turns[:1])),
        prompt_and_answer=_quoted(coder.text(turns)),
        ends=[f"`{tokens[token]}` ({token})" for token in coder.stop_ids],
        data=_data(data_name, summary),
        settings=_chosen(settings, adapter.adapter_folder),
        start=_start(summary),
        measured=_measured(summary),
        rows_evaluated=evaluation.get("rows_evaluated"),
        measures=_measures(evaluation),
    )


def _conversations(adapter: TrainedAdapter, summary: Mapping[str, Any]) -> bool | None:
    """Whether it was trained on conversations, not on single questions; None if nobody knows."""
    about = summary.get("data")
    if not isinstance(about, Mapping) or "conversations" not in about:
        return trained_on_conversations(adapter.adapter_folder)
    share: float = about["conversations"] / about["training_rows"]
    return share >= _SHARE_OF_CONVERSATIONS


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # Markdown: nothing is escaped but the bars of tables.
        loader=jinja2.PackageLoader("phitune", "assets"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2")


# --- tables: rows of texts ------------------------------------------------------------------------


def _data(name: str | None, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("name", f"`{name}`")] if name else []
    about = summary.get("data")
    if isinstance(about, Mapping):
        for key, value in about.items():
            if key == "mix":
                rows += [
                    (
                        f"mixed in from `{each['name']}`",
                        f"{each['rows_of_an_epoch']:,} of {each['rows']:,} rows in each epoch,"
                        f" {each['share']:.1%} of it",
                    )
                    for each in value
                ]
            elif key == "files":
                rows += [(f"SHA-256 of `{file}`", f"`{digest}`") for file, digest in value.items()]
            else:
                rows.append((key.replace("_", " "), f"{value:,}"))
    return rows


def _chosen(settings: Mapping[str, Any], adapter_folder: Path) -> list[tuple[str, str]]:
    """The settings of the run, or those in the adapter's own configuration."""
    if not settings:
        raw = read_object(adapter_folder / CONFIG_FILE, "")
        settings = {
            "lora_r": raw.get("r"),
            "lora_alpha": raw.get("lora_alpha"),
            "use_rslora": raw.get("use_rslora"),
            "lora_dropout": raw.get("lora_dropout"),
            "target_modules": raw.get("target_modules"),
        }
    return [
        (name, _shown(value)) for name in _SETTINGS if (value := settings.get(name)) is not None
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _start(summary: Mapping[str, Any]) -> str | None:
    """The adapter that training started from, without the folders of this machine."""
    start = summary.get("start_adapter")
    if not isinstance(start, Mapping):
        return None
    return f"`{start.get('name')}` (SHA-256 of {WEIGHTS_FILE}: `{start.get('sha256')}`)"


def _measured(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    first, best = summary.get("first_validation_loss"), summary.get("best_validation_loss")
    if isinstance(first, float) and isinstance(best, float):
        rows.append(("validation loss before", f"{first:.4f}"))
        rows.append(("validation loss after", f"{best:.4f}"))
    if "best_step" in summary:
        rows.append(("step of this adapter", f"{summary['best_step']} of {summary['steps']}"))
    if answers := summary.get("answers"):
        stopped = summary.get("answers_stopped_by_themselves")
        rows.append(("sample answers that ended with a stop token", f"{stopped} of {len(answers)}"))
    return rows


def _measures(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    measures = evaluation.get("measures")
    if not isinstance(measures, Mapping):
        return []
    right = evaluation.get("right_answers")  # None where nothing was answered
    rows = []
    if isinstance(right, Mapping):
        base, tuned = (f"{right[of]['right']} of {right['questions']}" for of in ("base", "tuned"))
        rows.append((f"right answers ({right['means']})", base, tuned))
    return rows + [
        (name.replace("_", " "), _figure(measure.get("base")), _figure(measure.get("tuned")))
        for name, measure in measures.items()
    ]


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- files of the run -----------------------------------------------------------------------------


def _settings(run: Path | None) -> dict[str, Any]:
    if run is None or not (run / CONFIG).is_file():
        return {}
    content = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def _object(run: Path | None, name: str) -> dict[str, Any]:
    return read_object(run / name, "") if run and (run / name).is_file() else {}
