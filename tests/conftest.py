"""Fixtures: small models on disk, the shared material where there is some, one thread a worker."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers.reference import CONFIGS, phi3_config, phi_config, random_model, save_model

from phitune.model.files import ASSETS

SHARED = Path(__file__).parents[2] / "shared" / "data"

# Two workers with two threads each would wait for one another on two cores.
torch.set_num_threads(1)
# Nothing a test does may reach for the network, neither here nor in a process of its own: the
# library has read the variable by now, when the imports above asked for it.
os.environ["HF_HUB_OFFLINE"] = "1"
huggingface_hub.constants.HF_HUB_OFFLINE = True
# Nor into the cache of the person who runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="phitune-test-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and tokenizers."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared test data, and there is no {SHARED}")
    return SHARED


@pytest.fixture(scope="session", params=["tiny-phi-2", "tiny-phi-3.5"])
def shipped_model(request: pytest.FixtureRequest) -> Path:
    return ASSETS / str(request.param)


@pytest.fixture(scope="session", params=CONFIGS)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of each architecture in transformers' layout; no tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(random_model(CONFIGS[request.param]()), folder)


@pytest.fixture(scope="session")
def phi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model(phi_config()), tmp_path_factory.mktemp("phi"))


@pytest.fixture(scope="session")
def phi3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(random_model(phi3_config()), tmp_path_factory.mktemp("phi3"))
