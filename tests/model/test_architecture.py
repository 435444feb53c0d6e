"""config.json: where it says a thing twice, we compute what transformers does, or name both."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from contradictions import contradicted, their_logits
from helpers.models import CONFIGS, random_folder
from helpers.numerics import error
from helpers.rows import logits_of, open_decoder, random_rows

from phitune.data.packing import pack
from phitune.errors import ModelError
from phitune.model.architecture import parse_model_config

NEAR = 1e-4
CASES = 60
ROWS = random_rows((13, 30))


def check(folder: Path, words: list[str]) -> str:
    """Asserts that our logits are those of transformers, or that an error has one of the words."""
    try:
        with torch.no_grad():
            ours = logits_of(open_decoder(folder), pack(ROWS))
    except ModelError as refused:
        said = str(refused)
    else:
        said = ""
    if said:
        assert any(word in said for word in words), (words, said)
        return "refused"
    expected = their_logits(folder, [row.input_ids for row in ROWS])
    if expected is None:
        return "not opened by transformers"
    assert error({"logits": ours}, {"logits": expected}) < NEAR
    return "equal"


def test_any_contradiction_is_what_transformers_makes_of_it_or_refused(tmp_path: Path) -> None:
    rng, outcomes = random.Random(0), Counter[str]()
    for number in range(CASES):
        kind = rng.choice(sorted(CONFIGS))
        folder = tmp_path / str(number)
        random_folder(CONFIGS[kind](), folder)
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        files, names, words = contradicted(rng, whole, "model")
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            outcomes[check(folder, words)] += 1
        except AssertionError as error_:
            config = json.loads(files["config.json"])
            raise AssertionError(f"case {number}, {kind}, {names}: {config}: {error_}") from None
    assert min(outcomes["equal"], outcomes["refused"]) > CASES / 10, outcomes


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "phi3-longrope",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
            ["rope_scaling is", "rope_parameters is", "take out the wrong one"],
        ),
        ("phi", {"rope_theta": 1e4, "rope_scaling": {"rope_theta": 1e6}}, ["rope_scaling.rope_th"]),
        ("phi", {"rotary_dim": 6}, ["rotary_dim is 6, and partial_rotary_factor (0.4) makes it 4"]),
        ("phi", {"n_embd": 48}, ["n_embd is 48, and hidden_size is 40"]),
        ("phi", {"n_embd": 40, "hidden_size": None}, ["n_embd is a name of the first Phi files"]),
    ],
)
def test_a_value_in_two_places_is_refused_by_both(
    kind: str, change: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ModelError) as refused:
        parse_model_config({**CONFIGS[kind](), **change})
    for words in said:
        assert words in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("phi", {"num_key_value_heads": None, "head_dim": 10}),
        ("phi", {"rope_theta": None, "rope_parameters": None}),
        ("phi", {"n_embd": 40, "n_inner": None, "rotary_dim": 4, "torch_dtype": "float16"}),
        ("phi", {"sliding_window": 9, "embd_pdrop": 0.1}),
        ("phi3-sliding", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 10_000.0}),
        ("phi3-longrope", {"dtype": "bfloat16", "torch_dtype": "float16", "rope_parameters": None}),
    ],
)
def test_what_is_null_or_the_same_twice_contradicts_nothing(
    kind: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder = random_folder({**CONFIGS[kind](), **change}, tmp_path)
    assert check(folder, []) in ("equal", "not opened by transformers")
