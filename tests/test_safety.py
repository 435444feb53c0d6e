"""Folders of strangers and secrets of the user: what is refused, and what is kept in."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file

from phitune import cli
from phitune.data import template
from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.template import render
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError, without_tokens
from phitune.model.adapter_config import CONFIG_FILE
from phitune.model.architecture import read_model_config
from phitune.model.files import ASSETS, find_model
from phitune.model.lora import WEIGHTS_FILE, load_adapter
from phitune.model.tensors import read_header
from phitune.model.weights import load_decoder
from phitune.untrusted import read_object

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"
MESSAGES = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "Yo <b>"}]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ASSETS / "tiny-phi-2", tmp_path / "model"))


def open_model(folder: Path) -> None:
    load_decoder(folder, read_model_config(folder), torch.float32, torch.device("cpu"))


# --- JSON ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "cannot be read"),
        ('{"a":' * 70 + "1" + "}" * 70, "more than 64 deep"),
        ('{"a": ' + "9" * 4000 + "}", "a number of 4,000 digits"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"a": "' + "x" * 2**23 + '"}', "has 8,388,617 bytes, more than the 8,388,608"),
        ('{"a": [' + "[]," * 2**20 + "[]]}", "more than 1,048,576 entries"),
        ("[]", "is not a JSON object"),
        ("\xff", "cannot be read"),
    ],
)
def test_json_that_nobody_writes_is_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=said) as caught:
        read_object(path, "")
    assert str(path) in str(caught.value)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"a": 1}')
    tracemalloc.start()
    try:
        assert read_object(path, "needed", max_bytes=2**30) == {"a": 1}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_pairs_of_surrogates_are_letters(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_object(tmp_path / "a.json", "") == {"a": "\U0001f600"}


# --- config.json ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("hidden_size", 0),
        ("hidden_size", -160),
        ("hidden_size", 160.0),
        ("vocab_size", "1536"),
        ("vocab_size", 10**19),
        ("num_key_value_heads", 5),
        ("intermediate_size", [640]),
        ("max_position_embeddings", 2**40),
        ("layer_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("partial_rotary_factor", 1.5),
        ("partial_rotary_factor", 0.0),
        ("rope_scaling", [1]),
        ("tie_word_embeddings", "false"),
        ("model_type", ["phi"]),
    ],
)
def test_sizes_that_no_model_has_are_refused_by_name(key: str, value: Any, model: Path) -> None:
    edit(model / "config.json", **{key: value})
    with pytest.raises(ModelError) as caught:
        read_model_config(model)
    assert str(model / "config.json") in str(caught.value)
    assert key in str(caught.value) or "no rotary part" in str(caught.value)


def test_sizes_that_the_files_do_not_bear_out_take_no_memory(model: Path) -> None:
    """Ten thousand times the memory there is, in sizes that are each within their limits."""
    edit(model / "config.json", num_hidden_layers=1000, intermediate_size=2**18)
    edit(model / "config.json", hidden_size=2**18, num_attention_heads=1024, head_dim=256)
    before = time.process_time()
    with pytest.raises(ModelError, match="do not fit config"):
        open_model(model)
    assert time.process_time() - before < 5


# --- safetensors ---


def with_header(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    claimed = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", claimed) + header + data)


def entry(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": entry([2**50], offsets=[0, 8])}, "invalid shape"),
        ({"a": entry([2**20, 2**20])}, "invalid shape"),
        ({"a": entry([2**32, 2**32])}, "overflow"),
        ({"a": entry([-1])}, "integer `-1`"),
        ({"a": entry([float("nan")])}, "invalid JSON"),
        ({"a": entry([True, 2])}, "boolean `true`"),
        ({"a": entry([1] * 9 + [2])}, "a has the shape"),
        ({"a": entry(), "b": entry([0, 2**41], offsets=[8, 8])}, "b has the shape"),
        ({"a": entry(dtype="F7")}, "F7"),
        ({"a": entry(dtype="F64")}, "invalid shape, data type"),
        ({"a": entry(offsets=[8, 16])}, "invalid offset for tensor `a`"),
        ({"a": entry(), "b": entry()}, "invalid offset for tensor"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "invalid offset for tensor `b`"),
        ({"a": entry(offsets=[8, 0])}, "invalid offset"),
        ({"a": entry(offsets=[0])}, "invalid length 1"),
        ({"a": entry(offsets=[0, 2**63])}, "invalid shape, data type, or offset"),
        ({"a": entry([1], offsets=[0, 4])}, "file not fully covered"),
        ({"a": 5}, "integer `5`"),
        ({"__metadata__": {"a": 1}, "a": entry()}, "expected a string"),
        ({"__metadata__": None, "a": entry()}, "__metadata__"),
        ([], "invalid type: sequence"),
        ({"x" * 2000: entry()}, "a name of 2,000 characters"),
        ({"x" * 2000: entry(offsets=[8, 16])}, "invalid offset for tensor `xxx"),
    ],
)
def test_headers_that_lie_are_refused(header: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with_header(path, json.dumps(header).encode(), bytes(8))
    with pytest.raises(ModelError, match=said) as caught:
        read_header(path)
    assert f"{path}: damaged or not a safetensors file" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 99, 2**25, 2**60, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with_header(path, json.dumps({"a": entry()}).encode(), bytes(8), length)
    with pytest.raises(ModelError, match="damaged or not a safetensors file"):
        read_header(path)
    path.write_bytes(b"abc")
    with pytest.raises(ModelError, match="bytes in a file of 3"):
        read_header(path)


def test_a_header_beyond_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    notes = {str(number): "x" * 1000 for number in range(5000)}
    with_header(path, json.dumps({"__metadata__": notes, "a": entry()}).encode(), bytes(8))
    with pytest.raises(ModelError, match="a header of 5,"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":TENSOR,"a":TENSOR}',
        b'{"__metadata__":{"a":"b","a":"c"},"x":TENSOR}',
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b' {"a":TENSOR}',
        b'{"a":TENSOR}x',
        b"[" * 10**6,
    ],
)
def test_a_name_twice_and_json_bombs_in_a_header_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with_header(path, header.replace(b"TENSOR", json.dumps(entry()).encode()), bytes(8))
    with pytest.raises(ModelError, match="damaged or not a safetensors file"):
        read_header(path)


def test_headers_are_read_as_the_library_reads_them(shipped_model: Path) -> None:
    path = shipped_model / "model.safetensors"
    ours = {name: header.shape for name, header in read_header(path).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ".", "a/b", ""])
def test_an_index_leads_nowhere_else(name: str, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.embed_tokens.weight": name}})
    )
    with pytest.raises(ModelError, match=r"index\.json: names files outside of its folder"):
        open_model(model)


def test_an_adapter_of_an_absurd_rank_takes_no_memory(tmp_path: Path) -> None:
    base = ASSETS / "tiny-phi-2"
    decoder = load_decoder(base, read_model_config(base), torch.float32, torch.device("cpu"))
    adapter = {"peft_type": "LORA", "r": 10**9, "lora_alpha": 1}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(adapter))
    name = "base_model.model.model.layers.0.mlp.fc1.lora_{}.weight"
    header = {name.format("A"): entry([1, 2]), name.format("B"): entry([2], offsets=[8, 16])}
    with_header(tmp_path / WEIGHTS_FILE, json.dumps(header).encode(), bytes(16))
    for rank in (10**9, 60_000):
        edit(tmp_path / CONFIG_FILE, r=rank)
        with pytest.raises(ModelError) as caught:
            load_adapter(decoder, tmp_path)
        assert str(tmp_path) in str(caught.value)


# --- links ---


def test_links_out_of_a_folder_are_not_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("{}")
    (tmp_path / "copy.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    said = r"is a link out of its folder"
    for name in ("merges.txt", "vocab.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("../private")
        with pytest.raises(ModelError, match=said):
            TextTokenizer(model)
        (model / name).unlink()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "copy.safetensors")
    with pytest.raises(ModelError, match=said):
        open_model(model)
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("config.json")
    with pytest.raises(ModelError, match=r"config\.json: missing"):
        read_model_config(model)


@pytest.mark.parametrize("store", ["models--a--b/blobs", "blobs/ab"])
def test_the_hubs_own_links_are_followed(store: str, tmp_path: Path) -> None:
    """Its folders hold links into a store, of the model or of all models."""
    folder, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / store
    folder.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted((ASSETS / "tiny-phi-2").iterdir())):
        shutil.copy(path, blobs / str(number))
        (folder / path.name).symlink_to(os.path.relpath(blobs / str(number), folder))
    (tmp_path / "linked").symlink_to(folder)
    for place in (folder, tmp_path / "linked"):
        open_model(place)
        TextTokenizer(place)
    (tmp_path / "private").write_text("{}")
    (folder / "merges.txt").symlink_to(tmp_path / "private")
    with pytest.raises(ModelError, match="is a link out of its folder"):
        TextTokenizer(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_or_a_device_is_no_file_and_nobody_waits_for_it(name: str, model: Path) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        path = model / name
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        make(path)
        reader = TextTokenizer if name.startswith("tokenizer") else open_model
        with pytest.raises(ModelError, match=r"missing|has no"):
            reader(model)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a" * 5000, "\0", "a/" + "b" * 300])
def test_names_that_no_folder_can_have(name: str) -> None:
    with pytest.raises(ModelError, match="model_name"):
        find_model(name)


# --- chat templates ---


def burning(source: str) -> Any:
    """A template that is stopped only after its second of processor time."""
    return pytest.param(source, marks=pytest.mark.campaign)


GROW = (
    "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = EACH %}{% endfor %}"
    "{{ n.x }}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        burning("{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}"
                "{{ f(40) }}"),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% block a %}{{ self.a() }}{% endblock %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [1] * 10**9 }}",
        burning("{{ 10 ** (10 ** 9) }}"),
        "{{ '%1000000000d' % 1 }}",
        "{{ '%(a)1000000000d' % {'a': 1} }}",
        "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%.*f' % (10**9, 1) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:1000000000}'|format(1) }}",
        "{{ (1).to_bytes(10**9, 'big') }}",
        "{{ 'a'|indent(10**9, true) }}",
        "{{ [1]|tojson(indent=10**9) }}",
        burning("{{ 1.5|round(10**9, 'ceil') }}"),
        "{{ range(90000)|join('a' * 100000) }}",
        "{{ ('a' * 100000).join(range(90000)|map('string')) }}",
        "{{ ('a' * 100000).replace('', 'a' * 100000) }}",
        "{{ lipsum(n=10**9) }}",
        GROW.replace("EACH", "n.x ~ n.x"),
        GROW.replace("EACH", "n.x + n.x"),
        GROW.replace("EACH", "n.x.replace('a', 'aa')"),
        burning(GROW.replace("EACH", "[n.x, n.x]")),
        burning(GROW.replace("EACH", "(n.x, n.x)")),
        burning(GROW.replace("EACH", "{1: n.x, 2: n.x}")),
        burning(GROW.replace("EACH", "dict(a=n.x, b=n.x)")),
        burning(GROW.replace("EACH", "namespace(a=n.x, b=n.x)")),
        burning(GROW.replace("'ab'", "3").replace("EACH", "n.x * n.x")),
        GROW.replace("{% set n.x = EACH %}", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
                     "{% set n.x = y %}"),
        "{% set x = 'a' * 10**6 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
        "{{ " + "+".join("1" * 9000) + " }}",
        "x" * 40_000,
    ],
)  # fmt: skip
def test_a_template_that_runs_away_is_stopped(source: str) -> None:
    with pytest.raises(ModelError, match="the chat template") as caught:
        render(source, MESSAGES, {"eos_token": "<e>"})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ raise_exception('no ' * 1000) }}",
        "{{ messages[0].x.y }}",
        "{{ 1 / 0 }}",
        "{% break %}",
        "{{",
    ],
)
def test_a_template_that_looks_around_or_fails_is_one_error(source: str) -> None:
    with pytest.raises(ModelError, match="the chat template") as caught:
        render(source, MESSAGES, {})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ loop.index ~ none }}{{ m }}{% endfor %}",
        "{% set ns = namespace(a=[], t='') %}{% for m in messages if m.role == 'user' %}"
        "{% set ns.a = ns.a + [m.content | trim, (1, 2.5)] %}{% endfor %}{{ ns.a }}{{ ns.t }}",
        "{% macro turn(m, end='!') %}{{ m['content'].strip().upper() + end }}"
        "{{ caller() if caller }}{% endmacro %}"
        "{{ turn(messages[0]) }}{% call turn(messages[1], end='?') %}x{% endcall %}",
        "{{ messages|tojson(indent=2) }}{{ messages|map(attribute='role')|join(', ') }}",
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ undefined_name }}",
        "{% set text %}{{ messages[1].content|e }}{% endset %}{{ text|replace('Y', 'y') }}",
        "{{ '%s-%03d' % ('a', 7) }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ -7 % 3 }}{{ 'ab' * 3 }}",
        "{% if 'user' in ['user', 'system'] and messages[-1].role not in ('x',) %}yes{% endif %}",
        "{{ messages[0].items()|list }}{{ {'a': [1]}['a'][0] }}{{ messages[::-1][0].role }}",
        "{% for a, b in messages[0]|dictsort %}{{ a }}={{ b }}{{ loop.cycle(1, 2) }}{% endfor %}",
        "{% for m in messages recursive %}{{ m.role if m.role else loop([m]) }}{% endfor %}",
        "{% filter upper %}{{ 'a' ~ 1 }}{% endfilter %}{{ 'a'|indent(2, true) }}{{ 2.5|round(1) }}",
    ],
)
def test_conversations_are_rendered_as_jinja_does(source: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # As transformers has it: the order of keys stays, and nothing is escaped for HTML.
    plain.filters["tojson"] = lambda value, indent: json.dumps(value, indent=indent)
    assert render(source, MESSAGES, {}) == plain.from_string(source).render(messages=MESSAGES)


def test_a_conversation_of_a_thousand_turns_is_far_below_the_limits(shared: Path) -> None:
    tokenizer = TextTokenizer(shared / "tokenizers" / "phi-3.5-mini-instruct")
    assert tokenizer.chat_template
    text = render(tokenizer.chat_template, MESSAGES * 500, tokenizer.special_tokens)
    assert text.count("Yo <b><|end|>") == 500


def test_what_a_template_draws_at_random_is_not_there() -> None:
    for source, name in (("{{ [1, 2]|random }}", "random"), ("{{ lipsum() }}", "lipsum")):
        with pytest.raises(ModelError, match=name):
            render(source, MESSAGES, {})


WITHOUT_LIMITS = """
import runpy, signal, sys
sys.modules["resource"] = None
del signal.setitimer
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 s"),
        ("{{ [1] * 10**9 }}", "256 MiB"),
    ],
)
def test_where_the_system_has_no_limits_a_template_is_watched(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-I", "-S", "-B", "-c", WITHOUT_LIMITS, template._COMMAND[-1]]
    monkeypatch.setattr(template, "_COMMAND", command)
    monkeypatch.setattr(template, "MAX_WAIT", 2.0)
    monkeypatch.setattr(template, "_worker", None)
    with pytest.raises(ModelError, match=f"was stopped: it takes more than {reason}"):
        render(source, MESSAGES, {})


def test_a_template_is_rendered_anew_after_its_process_ended_or_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, heeds_signals: None
) -> None:
    assert render("a", MESSAGES, {}) == "a"
    first = template._worker
    assert first
    first._process.kill()
    first._process.wait()
    assert render("b", MESSAGES, {}) == "b"

    def interrupted(self: Any, answered: Any) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        answered.wait(5)

    with monkeypatch.context() as patched:
        patched.setattr(template._Worker, "_watch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render("c", MESSAGES, {})
    assert render("d", MESSAGES, {}) == "d"


def test_a_fork_has_a_process_of_its_own_for_templates() -> None:
    assert render("parent", MESSAGES, {}) == "parent"
    ours = template._worker
    pid = os.fork()
    if pid == 0:
        good = render("child", MESSAGES, {}) == "child" and template._worker is not ours
        template._worker.end()
        os._exit(not good)
    assert os.waitpid(pid, 0)[1] == 0
    assert render("parent", MESSAGES, {}) == "parent"
    assert template._worker is ours


KILLED = """
import os, signal
from phitune.data import template
assert template.render("a", [], {}) == "a"
print(template._worker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_of_templates_ends_with_ours_and_is_not_there_without_one() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} goes on")
    code = (
        "import pathlib, sys; from phitune.data import coder, template, tokenizer;"
        "phi = tokenizer.TextTokenizer(pathlib.Path(sys.argv[1]));"
        "coder.Coder.of(phi, 'instruct').encode([]);"
        "assert template._worker is None and 'jinja2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(ASSETS / "tiny-phi-3.5")], check=True)


# --- tokenizer.json ---


def test_truncation_padding_and_dropout_saved_in_a_tokenizer_change_nothing(model: Path) -> None:
    whole = TextTokenizer(model)
    turns = (Turn("user", "What is the capital of Portugal?"), Turn("assistant", "Lisbon."))
    expected = Coder.of(whole, "instruct").encode(turns)
    raw = json.loads((model / "tokenizer.json").read_text())
    padding = {"pad_id": 1, "pad_type_id": 0, "pad_token": "a", "strategy": {"Fixed": 100}}
    edit(
        model / "tokenizer.json",
        truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Left"},
        padding={**padding, "direction": "Left", "pad_to_multiple_of": None},
        model={**raw["model"], "dropout": 0.9},
    )
    changed = TextTokenizer(model)
    assert Coder.of(changed, "instruct").encode(turns) == expected


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "ab"}},
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}},
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "("}}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "no", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "no"}},
        {"model": 5},
        {"added_tokens": 5},
        {"added_tokens": [{"id": -1, "content": "a"}]},
        {"added_tokens": [{"id": 2**60, "content": "a"}]},
        {"added_tokens": [{"id": 1, "content": ["a"]}]},
        {"added_tokens": [{"id": 1, "content": "a", "lstrip": 3}]},
        {"added_tokens": [5]},
    ],
)
def test_a_tokenizer_that_makes_the_library_panic_is_one_error(
    change: dict[str, Any], model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(model / "tokenizer.json", **change)
    with pytest.raises(ModelError, match=r"tokenizer\.json: invalid: ") as caught:
        TextTokenizer(model)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
        [{"type": "ByteLevel"}] * 40,
        [{"type": "Prepend", "prepend": "a" * 10**6}],
    ],
)
def test_rules_that_lengthen_a_text_without_end_are_not_tried(steps: Any, model: Path) -> None:
    edit(model / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    with pytest.raises(ModelError, match=r"its normalizer makes a text up to .* times"):
        TextTokenizer(model)


def test_ids_beyond_the_vocabulary_count_in_the_size(model: Path) -> None:
    raw = json.loads((model / "tokenizer.json").read_text())
    raw["model"]["vocab"]["a"] = 2**30
    edit(model / "tokenizer.json", model=raw["model"])
    assert TextTokenizer(model).size == 2**30 + 1


def test_special_tokens_of_any_type_are_left_alone(model: Path, tmp_path: Path) -> None:
    strange = [None, 5, ["a"], {"content": ["a"]}, {"content": 5}]
    for value in strange:
        edit(model / "tokenizer_config.json", bos_token=value, unk_token=value, auto_map={"a": "b"})
        edit(model / "generation_config.json", eos_token_id=[value, True, {}, [1], 10**9])
        tokenizer = TextTokenizer(model)
        coder = Coder.of(tokenizer, "instruct")
        assert coder.stop_ids == [tokenizer.token_id(coder.prompt_format.end_token)]
        coder.save(tmp_path)
        assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()


# --- secrets ---


@pytest.mark.parametrize(
    "text",
    [
        f"401 for url https://huggingface.co/x?token={TOKEN}",
        f"https://user:{TOKEN}@mirror.example/x",
        "https://user:other-secret-word@mirror.example/x",
        "https://other-secret-word@mirror.example/x",
        "Authorization: Bearer other-secret-word",
        "it is other-secret-word, from the environment",
    ],
)
def test_tokens_are_taken_out_of_errors(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "other-secret-word")
    for said in (without_tokens(text), str(ModelError(text)), repr(str(ModelError(text)))):
        assert TOKEN not in said
        assert "other-secret-word" not in said
    assert without_tokens("from hf_transfer and hf_hub_download") == (
        "from hf_transfer and hf_hub_download"
    )


def test_tokens_in_errors_of_the_hub_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "other-secret-word")

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(f"refused: https://u:{TOKEN}@hub.example other-secret-word \x1b[2J")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    assert cli.main(["plan", "--model_name", "no/such"]) == 2
    assert cli.main(["check", "no/such"]) == 2
    said = capsys.readouterr().err
    assert "the hub answered: refused" in said
    for secret in (TOKEN, "other-secret-word", "\x1b"):
        assert secret not in said


@pytest.mark.parametrize("debug", [False, True])
def test_tokens_are_not_in_the_log_of_an_internal_error(
    debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from phitune.commands import train

    def broken(argv: list[str]) -> int:
        raise RuntimeError(f"boom {TOKEN}")

    monkeypatch.setattr(train, "job_of", broken)
    if debug:
        monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    assert cli.main(["train"]) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: boom [token]" in said
    assert ("Traceback" in said) == debug
    if not debug:
        log = Path(said.split()[-1])
        assert "RuntimeError: boom [token]" in log.read_text()
        log.unlink()


def test_what_an_error_quotes_is_made_harmless_and_short(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model / "config.json", model_type="\x1b[2J\u202e" + "x" * 10**6)
    assert cli.main(["plan", "--model_name", str(model)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert len(said) < 3000


# --- a whole run, with the network forbidden and every file watched ---

GUARD = """
import os, sys
allowed = tuple(os.environ["GUARD_ALLOWED"].split(os.pathsep))
def guard(event, arguments):
    if event.startswith("socket.") or event == "pickle.find_class":
        with open(os.environ["GUARD_LOG"], "a") as log:
            log.write(event + "\\n")
        raise OSError("forbidden: " + event)
    if event == "open" and not isinstance(arguments[0], int):
        path, mode, flags = arguments
        if (flags or 0) & (os.O_WRONLY | os.O_RDWR) or set(mode or "") & set("wax+"):
            path = os.path.realpath(os.fspath(path))
            if not path.startswith(allowed) and path != os.devnull:
                os.write(2, ("written outside: " + path + "\\n").encode())
sys.addaudithook(guard)
"""
COMMANDS: list[Callable[[Path], list[str]]] = [
    lambda run: ["train", "--output_dir", str(run), "--epochs", "1", "--sample_tokens", "4"],
    lambda run: ["check", str(ASSETS / "captain.jsonl"), "--model_name", "tiny-phi-2"],
    lambda run: ["plan", "--model_name", "tiny-phi-3.5"],
]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(COMMANDS[0], id="train"),
        pytest.param(COMMANDS[1], id="check", marks=pytest.mark.campaign),
        pytest.param(COMMANDS[2], id="plan", marks=pytest.mark.campaign),
    ],
)
def test_nothing_leaves_the_machine_or_the_run_directory(
    command: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    """Without HF_HUB_OFFLINE: any socket is an error; so is a file outside of run and cache."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    run, home = tmp_path / "run", tmp_path / "home"
    (tmp_path / "tmp").mkdir()
    home.mkdir()
    data = home / "train.jsonl"
    data.write_text("".join((ASSETS / "captain.jsonl").open().readlines()[:24]))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "guard"), *sys.path]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "HF_TOKEN": TOKEN,
        "TMPDIR": str(tmp_path / "tmp"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "GUARD_ALLOWED": os.pathsep.join(
            [str(run), *(str(tmp_path / name) for name in ("cache", "tmp"))]
        ),
        "GUARD_LOG": str(tmp_path / "events"),
    }
    argv = command(run)
    if argv[0] == "train":
        argv += ["--model_name", "tiny-phi-2", "--dataset_path", str(data)]
    done = subprocess.run(
        [sys.executable, "-m", "phitune", *argv],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "events").exists(), (tmp_path / "events").read_text()
    assert "written outside" not in done.stderr
    assert [path.name for path in home.rglob("*")] == ["train.jsonl"]
    # torch makes the folder of its compiler when an optimizer is imported, and puts nothing there.
    left = [path for path in (tmp_path / "tmp").rglob("*") if "torchinductor_" not in path.name]
    assert left == []
    assert TOKEN not in done.stdout + done.stderr
    for path in run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert TOKEN.encode() not in content
            # Neither a pickle, nor the archive of one that torch writes.
            assert not content.startswith(
                (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")
            )
            assert path.suffix in (
                ".json",
                ".jsonl",
                ".yaml",
                ".md",
                ".safetensors",
                ".jinja",
                ".txt",
                "",
            )
    if argv[0] == "train":
        assert (run / "adapter" / WEIGHTS_FILE).is_file()


def test_the_hubs_library_is_told_not_to_tell() -> None:
    code = "import phitune, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    environment = {k: v for k, v in os.environ.items() if "TELEMETRY" not in k}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="torch knows expandable segments on Linux")
@pytest.mark.parametrize("theirs", [{}, {"PYTORCH_ALLOC_CONF": "backend:native"}])
def test_the_gpus_allocator_leaves_no_holes_unless_told_otherwise(theirs: dict[str, str]) -> None:
    code = "import phitune, os; print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))"
    environment = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k} | theirs
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == ("None" if theirs else "expandable_segments:True"), done.stderr


def test_an_adapter_that_names_no_model_folder_as_its_base_says_so(tmp_path: Path) -> None:
    from phitune.inference.loaded import open_model as open_adapters

    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "/"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model_name /: /config\.json: missing"):
        open_adapters([tmp_path])
