"""A model's name to the local folder that holds its files.

A name is a shipped model, a local folder, or a hub id. From the hub only configuration, tokenizer
and safetensors are fetched: no code, no pickles. HF_HOME and HF_HUB_OFFLINE are honoured.
"""

import re
from pathlib import Path

from phitune.config import MINIATURES, model_meant
from phitune.errors import ModelError
from phitune.model.adapter_config import CONFIG_FILE
from phitune.model.scheme import gguf_file

ASSETS = Path(__file__).parent.parent / "assets"
EXAMPLE_DATASET = ASSETS / "captain.jsonl"  # trained on where no data set is named
SHIPPED_MODELS = ("tiny-phi-2", "tiny-phi-3.5")
SMALL_FILES = (
    "config.json",
    "adapter_config.json",  # which does not belong there, and is said to
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_model_name(word: str) -> bool:
    """Whether a word is the name of a model of these families, and no path."""
    is_known = model_meant(word) != word or word in SHIPPED_MODELS
    return is_known or word.lower().startswith("microsoft/phi")


def find_model(name: str) -> Path:
    """The folder of a model, or that a GGUF file lies in; of a hub model only the small files are
    fetched.

    Raises:
        ModelError: there is no such model, or it cannot be fetched.
    """
    if name in SHIPPED_MODELS:
        return ASSETS / name
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            _refuse_adapter(name, path)
            return path
        if path.is_file() and path.suffix == ".gguf":
            return _folder_of_gguf(name, path)
        if path.exists():
            raise ModelError(f"model_name {name}: is a file, expected the folder of a model")
    except (OSError, ValueError, RuntimeError) as error:  # A name that no file can have.
        raise ModelError(f"model_name {name}: cannot be found: {error}") from None
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model_name {name}: there is no such folder, and it is neither a hub id (owner/name)"
            f" nor a shipped model ({', '.join(SHIPPED_MODELS)}, which {MINIATURES})"
        )
    return _from_hub(name, SMALL_FILES)


def _folder_of_gguf(name: str, path: Path) -> Path:
    """The folder of a GGUF file, which has to be the only model there."""
    folder = path.parent
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model_name {name}: a GGUF file needs config.json, tokenizer.json and"
            " tokenizer_config.json of the model that it was made from beside it"
        )
    if gguf_file(folder) != path:
        raise ModelError(
            f"model_name {name}: {folder} holds safetensors, too; put the GGUF file into a folder"
            " of its own, with config.json and the tokenizer"
        )
    return folder


def _refuse_adapter(name: str, folder: Path) -> None:
    """Refuses a folder that holds an adapter, or a run, and no model."""
    if (folder / "config.json").exists():
        return
    for what, file in (("an adapter", CONFIG_FILE), ("a run", f"adapter/{CONFIG_FILE}")):
        if (folder / file).is_file():
            raise ModelError(
                f"model_name {name}: is {what}, not a model; to train it further, name it with"
                " --start_adapter, and to use it, with --adapter_path (and its base model with"
                " --model_name)"
            )


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean a model of the hub."""
    is_here = name in SHIPPED_MODELS or Path(name).expanduser().exists()
    return not is_here and _HUB_ID.fullmatch(name) is not None


def cached_model(name: str) -> Path | None:
    """The folder of a hub model's config.json in the local cache; asks nobody on the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def fetch_weights(name: str, folder: Path) -> None:
    """Fetches the weights of a hub model that `find_model` put in `folder`; else does nothing.

    Kept apart because they are gigabytes: settings and data are checked first.

    Raises:
        ModelError: they cannot be fetched.
    """
    if name not in SHIPPED_MODELS and not Path(name).expanduser().exists():
        # The hub's folders are named by the commit they hold.
        _from_hub(name, WEIGHT_FILES, revision=folder.name)


def _from_hub(name: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    # Imported late: the hub library takes a third of a second, and local models do without it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError:
        why = "access to it has to be granted on its page, and HF_TOKEN set"
    except RepositoryNotFoundError:
        why = "the hub has no such model, or it is private and HF_TOKEN is not set"
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached and the model is not in the local cache"
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = f"the hub answered: {error}"
    raise ModelError(
        f"model_name {name}: {why}.\n"
        "Name a local folder with its files. --model_name tiny-phi-2 needs no network; the shipped"
        f" models {MINIATURES}"
    )
