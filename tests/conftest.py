"""Fixtures: small models on disk, the shared material where there is some, one thread a worker.

Nothing heavy is imported here: a test of text must not wait for torch.
"""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import runs
from helpers.models import CONFIGS, SNAPSHOT, fill_hub, phi3_config, phi_config, random_folder
from helpers.runs import FORMATS

from phitune.model.files import ASSETS

# Before anything that reads them is imported, here and in processes of the tests' own.
# Two workers with two threads each would wait for one another on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile keeps what it made by the code alone: what it made for AVX-512 is no use without.
if "ATEN_CPU_CAPABILITY" in os.environ:
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR",
        f"{tempfile.gettempdir()}/torchinductor-{os.environ['ATEN_CPU_CAPABILITY']}",
    )
# Triton's kernels run in its interpreter, which has to be chosen before triton is imported. Nothing
# else that runs on a CPU starts kernels of Triton's.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Nothing a test does may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor for the cache of the person who runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="phitune-test-cache-")
os.environ["TRACKIO_DIR"] = os.environ["XDG_CACHE_HOME"] + "/trackio"
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


MEMORY_DISK = Path("/dev/shm")
_ROOM = 4 * 2**30  # bytes; a run of all tests writes 1.5 GB
_MANY_MODULES = 100


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the tests' folders in memory where there is room: waiting for a disk to confirm each of
    the many checkpoints is a third of the time. Programs with real limits of memory or real disks
    make their folders elsewhere.
    """
    if not MEMORY_DISK.is_mount():
        return
    disk = os.statvfs(MEMORY_DISK)
    if disk.f_flag & os.ST_NOEXEC and config.option.markexpr != "not campaign":
        return  # A campaign starts what it has installed there.
    if min(disk.f_bavail * disk.f_frsize, psutil.virtual_memory().available / 4) > _ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_DISK))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: one that began last would leave all workers but its own without work."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


_looked_through = {"modules": 0}


def pytest_collection_finish() -> None:
    _freeze_modules()


def pytest_runtest_setup() -> None:
    if len(sys.modules) - _looked_through["modules"] > _MANY_MODULES:
        _freeze_modules()


def _freeze_modules() -> None:
    """What is imported stays for good, and need not be looked through by every collection, of
    which there is one at the end of each run."""
    gc.collect()
    gc.freeze()
    _looked_through["modules"] = len(sys.modules)


SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and tokenizers."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared test data, and there is no {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def cases() -> Path:
    """The folder of inputs that people have reported, to be read only."""
    folder = SHARED.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"needs the shared cases, and there is no {folder}")
    return folder


@pytest.fixture(scope="session", params=["tiny-phi-2", "tiny-phi-3.5"])
def shipped_model(request: pytest.FixtureRequest) -> Path:
    return ASSETS / str(request.param)


@pytest.fixture(scope="session", params=CONFIGS)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of each architecture in transformers' layout; no tokenizer."""
    return random_folder(CONFIGS[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def phi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(phi_config(), tmp_path_factory.mktemp("phi"))


@pytest.fixture(scope="session")
def phi3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(phi3_config(), tmp_path_factory.mktemp("phi3"))


@pytest.fixture(scope="session", params=FORMATS)
def trained_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each family, to be read only."""
    return runs.trained_run(tmp_path_factory, request.param)


@pytest.fixture(scope="session")
def phi_2_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of tiny-phi-2, to be read only."""
    return runs.trained_run(tmp_path_factory, "tiny-phi-2")


@pytest.fixture(scope="session")
def small_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF_HOME with a small "microsoft/phi-2" in its cache, to be read only."""
    return runs.once(tmp_path_factory, "hub", fill_hub)


@pytest.fixture
def small_phi_2(small_hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has "microsoft/phi-2", the default, be one small layer. Returns: its folder."""
    runs.use_hub(monkeypatch, small_hub)
    return small_hub / SNAPSHOT


@pytest.fixture
def short_general_text(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`phitune evaluate` measures forgetting on the beginning of the text that ships; all of it
    takes the tiny models a second."""
    text = tmp_path_factory.mktemp("general") / "general.txt"
    paragraphs = (ASSETS / "general.txt").read_text().split("\n\n")[:3]
    text.write_text("\n\n".join(paragraphs))
    monkeypatch.setattr("phitune.inference.evaluate.GENERAL_TEXT", text)


@pytest.fixture
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """`phitune export` proves with three prompts of its sixteen, where the proof is not the matter;
    the prompts are most of its time.
    """
    from phitune.export import proof

    monkeypatch.setattr(proof, "PROMPTS", proof.PROMPTS[:3])


@pytest.fixture
def heeds_signals() -> Iterator[None]:
    """Signals do what they do in a terminal, here and in processes of the test's own.

    A suite that was started with nohup, or in the background of a script, ignores some.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
