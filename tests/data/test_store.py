"""Tokens are kept, found again, verified, and split; a row costs memory of a few bytes."""

import json
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phitune.config import Settings
from phitune.data import store as store_module
from phitune.data.coder import Coder
from phitune.data.conversation import Example, Turn
from phitune.data.dataset import read_examples
from phitune.data.packing import epoch_steps, micro_batches
from phitune.data.prepare import PreparedData, prepare_data, split_rows
from phitune.data.store import (
    DamagedStoreError,
    StoreWriter,
    TokenRows,
    TokenStore,
    cache_folder,
    question_hash,
    tokenized,
)
from phitune.data.tokenizer import EncodedRow, TextTokenizer
from phitune.errors import DataError
from phitune.model.files import ASSETS

TOKENIZER = TextTokenizer(ASSETS / "tiny-phi-3.5")
CODER = Coder.of(TOKENIZER, "chat")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty conversations of two or four turns; every fourth question is asked twice."""
    path = tmp_path / "rows.jsonl"
    rows = []
    for number in range(40):
        turns = [
            ("user", f"What is {number - (number % 4 == 1)}?"),
            ("assistant", f"It is {number}."),
        ]
        if number % 3 == 0:
            turns += [("user", "Sure?"), ("assistant", "Yes. " * number + "Sure.")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def prepared(path: Path, **changes: Any) -> PreparedData:
    given = Settings(**{"prompt_format": "chat", **changes})
    return prepare_data(given, path, CODER)


def entries() -> list[Path]:
    return sorted(cache_folder().iterdir())


def test_the_rows_of_the_store_are_those_of_the_file(data: Path) -> None:
    found = tokenized(data, "train", Settings(), CODER)
    rows = TokenRows(found.store, np.arange(found.store.rows, dtype=np.uint32))
    expected = [CODER.encode_example(example) for example in read_examples(data)]
    assert list(rows) == expected
    assert rows[3:7] == expected[3:7]
    assert rows[-1] == expected[-1]
    assert rows.lengths().tolist() == [len(row.input_ids) for row in expected]
    assert rows.trained().tolist() == [row.num_target_tokens for row in expected]
    assert rows.num_tokens == sum(len(row.input_ids) for row in expected)
    assert rows.place(5) == f"{data}:6"
    longest = sorted(expected, key=lambda row: len(row.input_ids), reverse=True)
    for count in (0, 1, 7, 40, 99):
        assert rows.longest_rows(count) == longest[:count]


def test_the_second_start_reads_no_row_and_gives_the_same(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(data, validation_split=0.2, sample_prompts=["x"])
    monkeypatch.setattr(store_module, "StoreWriter", None)
    again = prepared(data, validation_split=0.2, sample_prompts=["x"])
    assert list(first.train_rows) == list(again.train_rows)
    assert list(first.validation_rows) == list(again.validation_rows)
    assert first.notes == again.notes[:-1]
    assert "its tokens are taken from the cache" in again.notes[-1]
    # The same file by another name; places are told by the name that was given.
    monkeypatch.chdir(data.parent)
    renamed = prepared(Path(data.name), validation_split=0, sample_prompts=["x"])
    assert renamed.train_rows.place(0) == f"{data.name}:1"
    assert renamed.notes[0].startswith(f"{data.name}: read as messages")
    # max_length is no part of it: rows are kept whole.
    short = prepared(data, validation_split=0, max_length=30)
    assert len(short.train_rows) < 40
    assert short.train_rows.longest <= 30
    assert "rows are longer than max_length 30" in short.warnings[0]


def test_rows_that_are_too_long_by_far_are_not_encoded_and_the_others_are_the_same(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    giant = {
        "messages": [
            {"role": "user", "content": "What is in the book?"},
            {"role": "assistant", "content": "the giant book " * 2000},
        ]
    }
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:9], json.dumps(giant), *lines[9:]]))
    in_full = prepared(data, max_length=200)  # Not a long row yet: it is encoded.

    monkeypatch.setattr("phitune.data.coder.SOON_ENCODED", 10_000)
    monkeypatch.setattr(store_module, "_code", lambda: "another version")
    encoded = []
    real = TextTokenizer.encode_batch

    def watched(tokenizer: TextTokenizer, rows: Any) -> Any:
        encoded.extend(segment.text for row in rows for segment in row)
        return real(tokenizer, rows)

    monkeypatch.setattr(TextTokenizer, "encode_batch", watched)
    short = prepared(data, max_length=200)
    assert not any("giant" in text for text in encoded)
    assert list(short.train_rows) == list(in_full.train_rows)
    assert list(short.validation_rows) == list(in_full.validation_rows)
    assert "(the longest has at least " in short.warnings[0]
    with pytest.raises(DataError, match=rf"{data}:10: at least \d+ tokens\nShorten these rows, or"):
        prepared(data, max_length=200, on_too_long="error")

    # Which rows have no tokens depends on max_length alone, never on what the cache holds, since
    # a run is resumed with rows of the same fingerprint.
    assert len(entries()) == 2  # with the one from before the row counted as long
    again = prepared(data, max_length=200)
    assert "from the cache" in again.notes[-1]
    prints = {200: again.train_rows.fingerprint}
    for max_length in (30, 10_000, 30, 200, 10_000):
        found = prepared(data, max_length=max_length).train_rows.fingerprint
        assert prints.setdefault(max_length, found) == found
    assert any("giant" in text for text in encoded)  # by the 10,000
    assert len(entries()) == 4  # in full before and now; without its tokens for 30 and for 200

    # Plain texts are cut into pieces, but an answer never is.
    encoded.clear()
    cut = prepared(data, max_length=200, on_too_long="split")
    assert not any("giant" in text for text in encoded)
    assert list(cut.train_rows) == list(in_full.train_rows)
    assert "from the cache" in prepared(data, max_length=200, on_too_long="split").notes[-1]


@pytest.mark.parametrize(
    "change",
    [
        {"train_on_prompt": True},
        {"on_bad_row": "skip"},
        {"data_format": "messages"},
        {"columns": "messages=messages"},
    ],
)
def test_what_changes_the_tokens_changes_the_entry(data: Path, change: dict[str, Any]) -> None:
    tokenized(data, "train", Settings(), CODER)
    tokenized(data, "train", Settings(**change), CODER)
    assert len(entries()) == 2


def test_other_data_tokenizers_and_formats_have_entries_of_their_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized(data, "train", Settings(), CODER)
    tokenized(data, "train", Settings(), Coder.of(TOKENIZER, "instruct"))
    other = TextTokenizer(ASSETS / "tiny-phi-2")
    tokenized(data, "train", Settings(), Coder.of(other, "instruct"))
    with data.open("a") as file:
        file.write('\n{"messages": [{"role": "user", "content": "n"}, ')
        file.write('{"role": "assistant", "content": "m"}]}')
    grown = tokenized(data, "train", Settings(), CODER)
    assert grown.store.rows == 41
    assert len(entries()) == 4
    monkeypatch.setattr(store_module, "_code", lambda: "another version")
    tokenized(data, "train", Settings(), CODER)
    assert len(entries()) == 5


@pytest.mark.parametrize("whole", [True, False])
def test_a_change_in_the_middle_is_seen_though_size_and_date_are_kept(
    data: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:  # As of a file that is too large to be hashed at every start.
        monkeypatch.setattr(store_module, "_HASHED_WHOLE", 0)
        monkeypatch.setattr(store_module, "_EDGE", 16)
    tokenized(data, "train", Settings(), CODER)
    content, found = bytearray(data.read_bytes()), data.stat()
    at = content.index(b'"content": "', len(content) // 2) + len(b'"content": "')
    content[at] ^= 1
    data.write_bytes(content)
    os.utime(data, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert data.stat().st_mtime_ns == found.st_mtime_ns
    changed = tokenized(data, "train", Settings(), CODER)
    assert len(entries()) == 2
    assert not any("taken from the cache" in note for note in changed.notes)


def test_no_cache_leaves_nothing_behind(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(data.parent / "tmp"))
    (data.parent / "tmp").mkdir()
    found = prepared(data, cache=False, validation_split=0)
    assert len(list(found.train_rows)) == 40
    assert not cache_folder().exists()
    assert list((data.parent / "tmp").iterdir())
    del found
    assert not list((data.parent / "tmp").iterdir())


def test_rows_left_out_are_told_at_every_start(data: Path) -> None:
    with data.open("a") as file:
        file.write("\n{}" * 25)
    first, again = (prepared(data, on_bad_row="skip", validation_split=0) for _ in range(2))
    assert len(first.train_rows) == len(again.train_rows) == 40
    for found in (first, again):
        assert "25 of 65 rows are left out" in found.warnings[0]
        assert f"{data}:41: 'messages' is missing" in found.warnings[0]
        assert "... and 5 more" in found.warnings[0]
    Path(first.warnings[0].partition("all of them are in ")[2]).unlink()
    assert "all of them" not in again.warnings[0]


def test_bad_data_leaves_no_entry(data: Path) -> None:
    data.write_text("{}")
    with pytest.raises(DataError):
        prepared(data)
    assert not entries()


COLUMNS = ("ids", "ends", "spans", "span_ends", "trained", "places", "questions")


@pytest.mark.parametrize("name", [*(f"{column}.bin" for column in COLUMNS), "manifest.json"])
@pytest.mark.parametrize("damage", ["a bit", "cut", "gone", "empty"])
def test_every_damage_is_seen_said_and_repaired(data: Path, name: str, damage: str) -> None:
    expected = list(prepared(data, validation_split=0).train_rows)
    (entry,) = entries()
    file = entry / name
    content = bytearray(file.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(DamagedStoreError, match=name.replace(".bin", r"\.bin")):
        TokenStore(entry, [data])
    again = prepared(data, validation_split=0)
    assert any(f"{entry}: is damaged ({name}" in warning for warning in again.warnings)
    assert list(again.train_rows) == expected
    assert entries() == [entry]
    assert not prepared(data, validation_split=0).warnings


def test_an_entry_that_is_a_file_or_half_written_is_replaced(data: Path) -> None:
    prepared(data)
    (entry,) = entries()
    shutil.rmtree(entry)
    entry.write_text("not a folder")
    assert "is damaged" in prepared(data).warnings[0]
    shutil.rmtree(entry)
    entry.mkdir()
    assert "is damaged" in prepared(data).warnings[0]
    assert (entry / "manifest.json").is_file()


def test_two_runs_at_once_make_one_entry(data: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: list(prepared(data).train_rows), range(4)))
    assert all(rows == found[0] for rows in found)
    assert len(entries()) == 1


def test_a_place_that_cannot_be_written_costs_the_cache_not_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = prepared(data, validation_split=0)
    assert len(found.train_rows) == 40
    assert "tokens cannot be kept there" in found.warnings[0]


def test_a_full_disk_is_one_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: StoreWriter, row: EncodedRow) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoreWriter, "add", full)
    with pytest.raises(DataError, match=r"No space left.*XDG_CACHE_HOME"):
        prepared(data)
    assert not entries()


def test_entries_unused_for_a_month_make_room(data: Path) -> None:
    prepared(data)
    (old,) = entries()
    month_ago = time.time() - 31 * 24 * 60 * 60
    os.utime(old / "manifest.json", (month_ago, month_ago))
    abandoned = cache_folder() / "x.new"
    abandoned.mkdir()
    os.utime(abandoned, (month_ago, month_ago))
    prepared(data, train_on_prompt=True)
    assert old not in entries()
    assert len(entries()) == 1


def store_of(folder: Path, questions: list[str]) -> TokenStore:
    folder.mkdir()
    writer = StoreWriter(folder, 100, [Path("rows")])
    for line, question in enumerate(questions, start=1):
        turns = (Turn("user", question), Turn("assistant", f"{line}"))
        writer.add(EncodedRow(Example(turns, Path("rows"), line), [1, 2], [(1, 2)]))
    writer.finish({})
    return TokenStore(folder, [Path("rows")])


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60),
    st.integers(0, 100),
    st.sampled_from([0.1, 0.2, 0.5]),
)
@settings(max_examples=150, deadline=None)
def test_split_leaks_no_prompt_and_loses_no_row(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], seed: int, share: float
) -> None:
    store = store_of(tmp_path_factory.mktemp("split") / "store", prompts)
    try:
        train, validation = split_rows(store, share, seed)
    except DataError:
        # One more prompt would have been needed to leave something on both sides.
        most = max(prompts.count(prompt) for prompt in prompts)
        assert len(prompts) - most < share * len(prompts)
        return
    assert len(train)
    assert sorted([*train, *validation]) == list(range(len(prompts)))
    assert [*train] == sorted(train)
    assert not {prompts[row] for row in train} & {prompts[row] for row in validation}
    assert len(validation) >= share * len(prompts)
    # No more than it needs: without its last group the share would not be reached.
    groups = {prompt: prompts.count(prompt) for prompt in {prompts[row] for row in validation}}
    assert len(validation) - max(groups.values()) < share * len(prompts)
    again = split_rows(store, share, seed)
    assert [part.tolist() for part in again] == [train.tolist(), validation.tolist()]


def test_split_is_seeded_of_the_size_asked_for_and_stays_when_the_data_grows(
    tmp_path: Path,
) -> None:
    store = store_of(tmp_path / "a", [str(number) for number in range(1000)])
    train, validation = split_rows(store, 0.1, seed=1)
    assert (len(train), len(validation)) == (900, 100)
    other = split_rows(store, 0.1, seed=2)[1]
    # Two independent draws of a tenth have a tenth in common.
    assert 0 < len({*validation} & {*other}) < 30
    assert len(split_rows(store, 0.0, seed=1)[1]) == 0
    grown = store_of(tmp_path / "b", [str(number) for number in range(1100)])
    with pytest.raises(DataError, match=r"0\.5 of 3 rows with 1 different prompts leaves nothing"):
        split_rows(store_of(tmp_path / "c", ["a"] * 3), 0.5, seed=1)
    kept = {*split_rows(grown, 0.1, seed=1)[1].tolist()} & {*validation.tolist()}
    assert len(kept) >= 85


def test_conversations_that_share_their_beginning_stay_together(shared: Path) -> None:
    """Paths of one OpenAssistant tree begin with the same question."""
    path = shared / "oasst_en_100_messages.jsonl"
    trees = [json.loads(line)["tree_id"] for line in path.open()]
    found = prepared(path, validation_split=0.2, max_length=4096)
    sides = [
        {trees[row] for row in rows.indices} for rows in (found.train_rows, found.validation_rows)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == len(set(trees))


def test_questions_of_completions_are_their_texts() -> None:
    first, second = (
        question_hash(Example((Turn("assistant", text),), Path("x"), 1)) for text in "ab"
    )
    assert first != second


def test_rows_asked_in_both_data_sets_are_named(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "validation.csv"
    other.write_text("prompt,response\nNew?,Yes.\nWhat is 2?,Two.\n")
    found = prepared(data, validation_path=other, validation_split=0)
    assert len(found.train_rows) == 40
    assert len(found.validation_rows) == 2
    assert f"1 rows of {other} have prompts that are trained on too (lines 3)" in found.warnings[0]
    assert [prompt.text for prompt in found.sample_prompts] == ["New?", "What is 2?"]


def test_samples_of_conversations_go_on_from_the_last_question(data: Path) -> None:
    found = prepared(data, validation_split=0)
    first, second = found.sample_prompts
    example = next(iter(read_examples(data)))
    assert first.text == CODER.text(example.turns[:-1])
    assert "Sure?" in first.text
    row = found.train_rows[0]
    assert row.input_ids[: len(first.ids)] == first.ids
    assert second.text == "What is 0?"
    assert prepared(data, sample_prompts=["Hi"]).sample_prompts[0].text == "Hi"


def test_samples_of_texts_go_on_from_their_first_words(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n} " + "word " * 20}) for n in range(5)))
    found = prepared(path, validation_split=0)
    prompt = found.sample_prompts[0]
    assert prompt.text == "0 word word word word word word word"
    assert found.train_rows[0].input_ids[: len(prompt.ids)] == prompt.ids


def test_the_order_of_an_epoch_is_that_of_a_list(data: Path) -> None:
    found = prepared(data, validation_split=0)
    rows = list(found.train_rows)
    order = list(range(len(rows)))
    random.Random("3/2").shuffle(order)
    steps = epoch_steps(len(rows), 8, seed=3, epoch=2)
    read = [batch for step in steps for batch in micro_batches(found.train_rows, step, 2)]
    ids = [token for batch in read for token in batch.input_ids.tolist()]
    assert ids == [token for index in order for token in rows[index].input_ids]


def test_pages_that_were_read_are_given_back(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepared(data, validation_split=0)
    released: list[int] = []
    monkeypatch.setattr("phitune.data.store._ROWS_BETWEEN_RELEASES", 10)
    original = TokenStore._release
    monkeypatch.setattr(
        TokenStore, "_release", lambda store: (released.append(1), original(store))[1]
    )
    assert len(list(found.train_rows)) == 40
    assert len(released) == 4
