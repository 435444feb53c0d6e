"""Files that are something else than their name says: one sentence with the cause."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.random_adapters import write_adapter
from helpers.rows import open_decoder
from safetensors.torch import save_file

from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError
from phitune.model.architecture import read_model_config
from phitune.model.files import ASSETS
from phitune.model.lora import load_adapter
from phitune.model.tensors import read_header
from phitune.untrusted import read_object

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
WRONG = {
    "pointer": (POINTER, "is a Git LFS pointer, not the file: git lfs pull"),
    "empty": (b"", "is empty"),
    "blank": (b"\n \n", "is empty"),
    "zeros": (b"\0" * 5000, "holds zeros only"),
    "page": (b"<!DOCTYPE html>\n<html><head>", "is a web page, not the file"),
    "page with a blank line": (b"\n<HTML lang=en>", "is a web page, not the file"),
    "answer of a bucket": (b"<?xml version='1.0'?><Error>", "is a web page, not the file"),
    "answer of the hub": (b"Entry not found", "is what a server answered, not the file"),
    "answer in JSON": (b'{"error":"Access denied"}', "is what a server answered, not the file"),
    "UTF-16": ("{}".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "mark": ("{}".encode("utf-8-sig"), "is text in UTF-8 with a byte order mark"),
    "torch.save": (b"PK\x03\x04" + b"x" * 90, "is a pickle, and loading a pickle runs"),
    "pickle": (b"\x80\x02}q\x00." + b"x" * 90, "is a pickle, and loading a pickle runs"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 90, "is a GGUF file for llama.cpp"),
    "gzip": (b"\x1f\x8b\x08" + b"x" * 90, "is packed with gzip"),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "tiny-phi-2", tmp_path / "model"))


@pytest.mark.parametrize("kind", WRONG)
def test_what_lies_in_the_place_of_a_file_is_named(kind: str, model: Path, adapter: Path) -> None:
    content, said = WRONG[kind]
    readers: tuple[tuple[Path, Callable[[], object]], ...] = (
        (model / "config.json", lambda: read_model_config(model)),
        (model / "tokenizer.json", lambda: TextTokenizer(model)),
        (model / "model.safetensors", lambda: open_decoder(model)),
        (
            adapter / "adapter_config.json",
            lambda: load_adapter(open_decoder(ASSETS / "tiny-phi-2"), adapter),
        ),
        (
            adapter / "adapter_model.safetensors",
            lambda: load_adapter(open_decoder(ASSETS / "tiny-phi-2"), adapter),
        ),
    )
    for path, read in readers:
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ModelError) as refused:
            read()
        assert str(refused.value).startswith(f"{path}: {said}")
        assert len(str(refused.value).splitlines()) == 1
        path.write_bytes(whole)
        read()


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_as_a_pickle_does_is_read(length: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for size in range(1, 2000):
        save_file({"a": torch.zeros(1)}, file, metadata={"x": "x" * size})
        if struct.unpack("<Q", file.read_bytes()[:8])[0] == length:
            break
    assert file.read_bytes()[0] == 0x80
    assert list(read_header(file)) == ["a"]


def test_a_key_that_is_there_twice_has_one_value(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": 1, "b": {"c": 2, "c": 2}, "a": 1}')
    assert read_object(file, "") == {"a": 1, "b": {"c": 2}}
    file.write_text('{"b": {"c": 2, "d": 1, "c": 3}}')
    with pytest.raises(ModelError, match="'c' is there twice, with two values"):
        read_object(file, "")


def test_reported_pointers_are_named(cases: Path) -> None:
    with pytest.raises(ModelError, match="is a Git LFS pointer, not the file: git lfs pull"):
        read_header(cases / "23-git-lfs-pointers" / "model" / "model.safetensors")
    with pytest.raises(ModelError, match="is a Git LFS pointer, not the file: git lfs pull"):
        TextTokenizer(cases / "23-git-lfs-pointers" / "model")
