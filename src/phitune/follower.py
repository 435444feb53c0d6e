"""The processes 1, 2, ... of a run: they take everything from process 0, and compute their part.

A follower reads no settings and writes no file. It loads the same rows and the same base, takes
over the state of process 0, and goes through the same loop.
"""

from collections.abc import Mapping
from typing import Any

import torch

from phitune.apple.choice import engine_of, load_decoder_on
from phitune.config import Settings
from phitune.data.coder import Coder
from phitune.data.mix import rows_per_epoch
from phitune.data.prepare import PreparedData, prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ResumeError, listing
from phitune.model.architecture import read_model_config
from phitune.model.device import DTYPES, choose_device, deterministic, torch_device
from phitune.model.engine import Engine
from phitune.model.files import EXAMPLE_DATASET, fetch_weights, find_model
from phitune.model.lora import attach
from phitune.model.quantization import quantization_from_json
from phitune.model.start_adapter import spec_of
from phitune.model.weights import weights_fingerprint
from phitune.training.events import Paused
from phitune.training.group import EndedError, Group, Member
from phitune.training.interrupt import stop_signals
from phitune.training.loop import fit, start_state
from phitune.training.processes import Processes
from phitune.training.resume import data_fingerprints, differences
from phitune.training.state import TrainingState


def begin_together(
    processes: Processes, facts: Mapping[str, str], engine: Engine, state: TrainingState
) -> None:
    """Gives the followers what process 0 starts from; to be called by all of them.

    Args:
        facts: what must be the same everywhere, in words.

    Raises:
        ResumeError: it is not.
    """
    there = processes.meet(
        {
            "facts": dict(facts),
            "threads": torch.get_num_threads(),
            "recompute_layers": engine.recompute_layers,
            "numbers": state.numbers(),
            "spans": state.sums.known,
        }
    )
    for rank, other in enumerate(there):
        if found := differences(there[0]["facts"], other["facts"]):
            lines = [f"{each.name}: {each.now}, on process 0 {each.then}" for each in found]
            raise ResumeError(
                f"process {rank} would not train on what process 0 trains on:\n{listing(lines)}\n"
                "Give all machines the same files and versions."
            )
    first = there[0]
    if processes.rank:
        torch.set_num_threads(first["threads"])
        engine.recompute_layers = first["recompute_layers"]
        state.take_numbers(first["numbers"])
        state.sums.elsewhere = frozenset(first["spans"])
    processes.spread(state.tensors_of_update())


def facts_of(
    data: PreparedData, tokenizer: TextTokenizer, base: str, engine: Engine
) -> dict[str, str]:
    """What must be the same in all processes.

    Args:
        base: the fingerprint of its weights.
    """
    return {**data_fingerprints(data, tokenizer), "base model": base, **engine.choices}


class Follower:
    """A process of a run that process 0 leads."""

    def __init__(self, member: Member) -> None:
        self.member = member

    def train(self) -> None:
        """Computes its part of the run, to its end.

        Raises:
            PhituneError: the data or the model cannot be used here, or another process is gone.
            SystemExit: process 0 has ended, with its exit code.
        """
        processes = Group(self.member)
        try:
            with processes.taking_part():
                job = processes.hear("job")
                settings = Settings.model_validate(job["settings"])
                device = settings.device
                if device.startswith("cuda"):
                    device = f"cuda:{self.member.local_rank}"
                processes.device = torch_device(choose_device(device))
                if processes.device.type == "cuda":
                    torch.cuda.set_device(processes.device)
                with deterministic(processes.device, wanted=settings.deterministic):
                    engine, state, data, facts = _prepared(settings, device, job)
                    begin_together(processes, facts, engine, state)
                    with stop_signals(lambda text: None, processes.ask_to_stop):
                        for event in fit(engine, state, data, settings, processes):
                            if isinstance(event, Paused):
                                break
        except EndedError as error:
            if error.rank == 0:
                raise SystemExit(error.exit_code) from None
            raise


def _prepared(
    settings: Settings, device: str, job: Mapping[str, Any]
) -> tuple[Engine, TrainingState, PreparedData, dict[str, str]]:
    """Rows, base, adapter and engine as process 0 has them, and what they are."""
    folder = find_model(settings.model_name)
    config, tokenizer = read_model_config(folder), TextTokenizer(folder)
    coder = Coder.of(tokenizer, settings.prompt_format)
    data = prepare_data(settings, settings.dataset_path or EXAMPLE_DATASET, coder)
    fetch_weights(settings.model_name, folder)
    found = job["quantization"]
    held = quantization_from_json(found) if found else settings.base_placement
    assert held != "auto"  # Process 0 has chosen.
    decoder = load_decoder_on(folder, config, DTYPES[settings.precision], device, held)
    base = weights_fingerprint(decoder)
    adapter = attach(decoder, spec_of(settings, tuple(job["modules"])), settings.seed)
    engine = engine_of(decoder, settings, keep_freed=job["keep_freed"])
    state = start_state(engine, adapter, rows_per_epoch(data.train_rows), settings)
    return engine, state, data, facts_of(data, tokenizer, base, engine)
