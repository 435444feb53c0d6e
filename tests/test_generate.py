"""Greedy generation against transformers' own."""

from pathlib import Path

import pytest
import torch
from reference import CONFIGS, VOCAB_SIZE, random_model, save_model
from rows import open_decoder

from phitune.inference.generate import generate


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_equal_transformers_also_past_the_longrope_threshold(
    kind: str, tmp_path: Path
) -> None:
    model = random_model(CONFIGS[kind](), torch.float64)
    decoder = open_decoder(save_model(model, tmp_path), torch.float64)
    # With 16 new tokens: below, across and above 24 positions, in one batch.
    asked = prompts(3, 15, 30, 24)
    answers = generate(decoder, asked, max_new_tokens=16, stop_ids=[])
    for prompt, answer in zip(asked, answers, strict=True):
        reference = model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert answer.ids == reference[0, len(prompt) :].tolist()
        assert not answer.stopped


def test_a_stop_token_ends_its_own_answer_only(phi_folder: Path) -> None:
    decoder = open_decoder(phi_folder)
    asked = prompts(5, 9)
    free = generate(decoder, asked, max_new_tokens=10, stop_ids=[])
    stop = free[0].ids[4]
    stopped = generate(decoder, asked, max_new_tokens=10, stop_ids=[stop])
    expected = free[0].ids[: free[0].ids.index(stop) + 1]
    assert stopped[0].ids == expected
    assert stopped[0].stopped
    if stop not in free[1].ids:
        assert stopped[1].ids == free[1].ids


def test_generation_ends_where_positions_end_and_zero_tokens_are_none(phi_folder: Path) -> None:
    decoder = open_decoder(phi_folder)
    (answer,) = generate(decoder, prompts(125), max_new_tokens=50, stop_ids=[])
    assert len(answer.ids) == 4  # Positions 0 to 127; the last one still predicts a token.
    assert generate(decoder, prompts(3), max_new_tokens=0, stop_ids=[])[0].ids == []
