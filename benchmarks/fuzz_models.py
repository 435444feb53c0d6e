"""Damaged model and adapter folders by the thousand: each loads, or is refused in one error.

    python benchmarks/fuzz_models.py [--cases 20000] [--seed N] [--jobs N]

Small models of both families and adapters on them are damaged (model_damage.py) and opened as the
commands do: folder, config.json, tokenizer, both prompt formats, weights, adapter; what loads must
answer a prompt, and its tokenizer must save. A case fails by any other exception than ModelError,
by an error without the place, by taking more than 5 s, by ending the process, by a file written
outside of the run directory, by a word on the error stream, by reading a file that a link leads to,
by asking the network, and by starting a process (other than the one that renders chat templates).
Four folders in ten are whole, and say a thing twice or name an option that nobody trained with
(contradictions.py): these must give the logits of transformers and PEFT, or be refused by the name
of what contradicts. Cases run in a child process with a limit on its memory, so that one that ends
it is told from the others. Writes results/fuzz_models.json and .md.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CASES = 20_000
SECONDS = 5.0
_PATIENCE = 120.0  # seconds without a word, after which a case is taken for a hang
_MEMORY = 3 * 2**30  # bytes a case may take on top of what the process starts with
_SECRET = "a private file of somebody else"
_MAX_MESSAGE = 30_000


@dataclass
class Found:
    """What came out of a campaign."""

    outcomes: Counter[str] = field(default_factory=Counter)  # "kind of folder/outcome"
    damages: Counter[str] = field(default_factory=Counter)  # "damage/outcome"
    failures: list[dict[str, Any]] = field(default_factory=list)
    longest: dict[str, Any] = field(default_factory=lambda: {"used": 0.0})  # case
    peak_memory: int = 0  # bytes of the process


def campaign(number: int, seed: int) -> Found:
    """So many cases, from a seed."""
    found = Found()
    at = 0
    while at < number:
        with tempfile.TemporaryDirectory(prefix="phitune-fuzz-") as scratch:
            for case in _child(seed, at, number, Path(scratch)):
                at = case["case"] + 1
                kind, outcome = case["kind"], case["outcome"]
                found.outcomes[f"{kind}/{outcome}"] += 1
                for name in set(case["damages"]):
                    found.damages[f"{name}/{outcome}"] += 1
                found.longest = max(found.longest, case, key=lambda one: one["used"])
                found.peak_memory = max(found.peak_memory, case["memory"])
                if outcome == "failed":
                    found.failures.append({"seed": seed, **case})
    return found


def _joined(shares: Sequence[Found]) -> Found:
    """What came out of all of them."""
    return Found(
        sum((share.outcomes for share in shares), Counter()),
        sum((share.damages for share in shares), Counter()),
        [failure for share in shares for failure in share.failures],
        max((share.longest for share in shares), key=lambda one: one["used"]),
        max(share.peak_memory for share in shares),
    )


def _child(seed: int, start: int, stop: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """Runs cases until all are done or one ends the process, which is then the last."""
    home = scratch / "home"
    home.mkdir()
    environment = {
        **os.environ,
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(scratch),
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    errors = (scratch / "errors").open("w+")
    command = [sys.executable, __file__, "--child", str(seed), str(start), str(stop), str(scratch)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=home
    )
    assert child.stdout
    done = start
    case: dict[str, Any] = {}
    while select.select([child.stdout], [], [], _PATIENCE if case else 300)[0]:
        line = child.stdout.readline()
        if not line:
            break
        case = json.loads(line)
        said = (scratch / "errors").read_text()
        if said and case["outcome"] != "failed":
            case |= {"outcome": "failed", "why": f"on the error stream: {said[:2000]}"}
            errors.truncate(0)
        if left := [str(path) for path in home.rglob("*")]:
            case |= {"outcome": "failed", "why": f"written: {left[:5]}"}
        done = case["case"] + 1
        yield case
    child.kill()
    code = child.wait()
    if done < stop:
        said = (scratch / "errors").read_text()[-2000:]
        assert case or start, f"the child did not start: {said}"
        _, kind, damages, _ = _drawn(seed, done)
        why = f"the process ended ({code}) or hung: {said}"
        yield {
            **{"case": done, "kind": kind, "damages": damages, "outcome": "failed", "why": why},
            **{"used": 0.0, "memory": 0},
        }


_JUDGED = "contradicted"
_KINDS = (
    *("phi model", "phi3 model", "phi sharded", "phi3 sharded", "phi adapter", "phi3 adapter"),
    "phi3 adapter in parts",  # Llama's layout: q_proj, k_proj and v_proj, gate_proj and up_proj
    *(f"phi model {_JUDGED}", f"phi3 model {_JUDGED}"),
    *(f"phi adapter {_JUDGED}", f"phi3 adapter {_JUDGED}"),
)


def _drawn(
    seed: int, case: int, wholes: dict[str, Any] | None = None, base: Path = Path()
) -> tuple[Any, str, list[str], list[str]]:
    """The folder of a case, its kind, the names of its damages, and words of the error to come."""
    from contradictions import contradicted
    from model_damage import DAMAGES, damaged

    rng = random.Random(f"{seed}/{case}")
    kind = rng.choice(_KINDS)
    if wholes is None:  # Only what it was, for a case that ended its process.
        count = rng.choice((1, 1, 1, 2, 3))
        return {}, kind, [rng.choice(sorted(DAMAGES))] if count == 1 else ["several"], []
    if kind.endswith(_JUDGED):
        _, of, _ = kind.split()
        folder, names, words = contradicted(rng, wholes[kind.removesuffix(f" {_JUDGED}")], of)
        return folder, kind, names, words
    folder, damages = damaged(rng, wholes[kind], base)
    return folder, kind, damages, []


_NEAR = 1e-4


def _judged(folder: Path, base: Path, of: str) -> tuple[str, str]:
    """Whether what was loaded computes what transformers and PEFT do."""
    import torch
    from contradictions import their_logits

    from phitune.model.architecture import read_model_config
    from phitune.model.lora import load_adapter
    from phitune.model.weights import load_decoder

    model = folder if of == "model" else base
    ids = torch.arange(1, 41)
    theirs = their_logits(model, [ids.tolist()], folder if of == "adapter" else None)
    if theirs is None:
        return "loaded", ""
    decoder = load_decoder(model, read_model_config(model), torch.float32, torch.device("cpu"))
    if of == "adapter":
        load_adapter(decoder, folder)
    with torch.no_grad():
        ours = decoder.logits(decoder(ids, torch.arange(40), (0, 40)))
    apart = float(torch.dist(ours, theirs) / theirs.norm())
    return ("loaded", "") if apart < _NEAR else ("failed", f"{apart:.2g} from their logits")


def _run_cases(seed: int, start: int, stop: int, scratch: Path) -> None:
    """The child: a line of JSON for each case."""
    import torch
    from model_damage import SECRET, whole_folders

    torch.set_num_threads(1)
    importlib.import_module("peft")  # before memory is limited
    bases = {kind: scratch / f"base-{kind}" for kind in ("phi", "phi3")}
    wholes = whole_folders(bases)
    for kind, base in bases.items():
        _write(wholes[f"{kind} model"], base)
        _check_whole(base)
    _check_parts(wholes["phi3 model"], wholes["phi3 adapter in parts"], bases["phi3"])
    (scratch / SECRET).write_text(_SECRET)
    folder, run = scratch / "case", scratch / "run"
    watch = _Watch(run)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY,) * 2)
    for number in range(start, stop):
        drawn, kind, damages, words = _drawn(seed, number, wholes, bases["phi"])
        for path in (folder, run):
            shutil.rmtree(path, ignore_errors=True)
        _write(drawn, folder)
        run.mkdir()
        before = time.process_time()
        watch.seen.clear()
        watch.on = True
        try:
            outcome, why = _check(kind, folder, bases[kind.split()[0]], run)
        finally:
            watch.on = False
        used = time.process_time() - before
        if kind.endswith(_JUDGED) and outcome == "loaded":
            outcome, why = _judged(folder, bases[kind.split()[0]], kind.split()[1])
        elif words and outcome == "refused" and not any(word in why for word in words):
            outcome, why = "failed", f"none of {words} is named: {why[:2000]}"
        if watch.seen:
            outcome, why = "failed", f"not allowed: {watch.seen[:3]}"
        if used > SECONDS:
            outcome, why = "failed", f"took {used:.1f} s of processor time"
        copied = [path for path in run.rglob("*") if path.is_file()]
        if _SECRET in why or any(_SECRET.encode() in path.read_bytes() for path in copied):
            outcome, why = "failed", "a file that a link led to was read"
        said: dict[str, Any] = {"case": number, "kind": kind, "damages": damages}
        said |= {"outcome": outcome, "why": why if outcome == "failed" else "", "used": used}
        said["memory"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(said), flush=True)


class _Watch:
    """Notes writing outside of a folder, the network, and other processes."""

    _WRITES = (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "os.chmod",
    )
    _NEVER = (
        "socket.",
        "subprocess.",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "pickle.",
    )

    def __init__(self, allowed: Path) -> None:
        self.allowed, self.on = str(allowed), False
        self.seen: list[str] = []
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not isinstance(path, int) and (writes or (mode and set(mode) & set("wax+"))):
                self._note(event, path)
        elif event in self._WRITES:
            self._note(event, arguments[0])
        elif event.startswith(self._NEVER) and not self._renders(event, arguments):
            self.seen.append(event)

    @staticmethod
    def _renders(event: str, arguments: tuple[Any, ...]) -> bool:
        """The process for chat templates, started again after a template ended it."""
        from phitune.data import template_worker

        return event == "subprocess.Popen" and template_worker.__file__ in arguments[1]

    def _note(self, event: str, path: Any) -> None:
        name = os.path.realpath(os.fspath(path))
        if not name.startswith(self.allowed) and name != os.devnull:
            self.seen.append(f"{event} {name}")


def _write(files: dict[str, Any], folder: Path) -> None:
    from model_damage import Link, Special

    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Link):
            path.symlink_to(content.target)
        elif content == Special("folder"):
            path.mkdir()
        elif content == Special("pipe"):
            os.mkfifo(path)
        else:
            path.touch()
            os.truncate(path, 10**8)


def _check_whole(base: Path) -> None:
    """The folders that are damaged are whole to begin with, and everything is imported."""
    run = base.parent / "run"
    run.mkdir()
    assert _check("model", base, base, run)[0] == "loaded"
    shutil.rmtree(run)


def _check_parts(model: dict[str, Any], adapter: dict[str, Any], base: Path) -> None:
    """The adapter in parts computes what its matrices do on the fused weights."""
    import torch
    from model_damage import with_parts_added

    from phitune.model.architecture import read_model_config
    from phitune.model.lora import load_adapter
    from phitune.model.weights import load_decoder

    config = read_model_config(base)
    folders = {name: base.parent / name for name in ("parts", "merged")}
    _write(adapter, folders["parts"])
    _write(with_parts_added(model, adapter, config), folders["merged"])
    ids, logits = torch.arange(1, 41), []
    for folder in (base, folders["merged"]):
        decoder = load_decoder(folder, config, torch.float32, torch.device("cpu"))
        if folder == base:
            load_adapter(decoder, folders["parts"])
        with torch.no_grad():
            logits.append(decoder.logits(decoder(ids, torch.arange(40), (0, 40))))
    assert torch.dist(*logits) < _NEAR * logits[1].norm()
    for folder in folders.values():
        shutil.rmtree(folder)


def _check(kind: str, folder: Path, base: Path, run: Path) -> tuple[str, str]:
    """Opens a folder as the commands do. Returns: "loaded", "refused" or "failed", and why."""
    from phitune.errors import ModelError

    try:
        if "adapter" in kind:
            _open_adapter(folder, base, run)
        else:
            _open_model(folder, run)
    except ModelError as error:
        said = str(error)
        if str(folder) not in said and "model_name" not in said:
            return "failed", f"names no place: {said[:2000]}"
        if len(said) > _MAX_MESSAGE:
            return "failed", f"an error of {len(said)} characters: {said[:200]}"
        return "refused", said
    except BaseException as error:
        import traceback

        return "failed", f"{type(error).__name__}: {traceback.format_exc()[-3000:]}"
    return "loaded", ""


def _open_model(folder: Path, run: Path) -> None:
    import torch

    from phitune.data.tokenizer import TextTokenizer
    from phitune.errors import ModelError
    from phitune.model.architecture import read_model_config
    from phitune.model.files import find_model
    from phitune.model.weights import load_decoder

    config = read_model_config(find_model(str(folder)))
    tokenizer = TextTokenizer(folder)
    _use_tokenizer(tokenizer, run)
    decoder = load_decoder(folder, config, torch.float32, torch.device("cpu"))
    if tokenizer.size > config.vocab_size:  # As commands check.
        raise ModelError(f"{folder}: the tokenizer has more tokens than the model")
    _forward(decoder)


def _open_adapter(folder: Path, base: Path, run: Path) -> None:
    import torch

    from phitune.data.coder import Coder
    from phitune.data.tokenizer import TextTokenizer
    from phitune.inference.loaded import adapter_folder, open_model
    from phitune.model.architecture import read_model_config
    from phitune.model.lora import load_adapter
    from phitune.model.weights import load_decoder

    config = read_model_config(base)
    decoder = load_decoder(base, config, torch.float32, torch.device("cpu"))
    load_adapter(decoder, adapter_folder(folder))
    _forward(decoder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = TextTokenizer(folder)
        _use_tokenizer(tokenizer, run)
        if tokenizer.size <= config.vocab_size:
            Coder.as_saved(tokenizer)
            open_model([folder], device="cpu", precision="fp32")


def _use_tokenizer(tokenizer: Any, run: Path) -> None:
    from phitune.data.coder import Coder
    from phitune.data.conversation import Turn
    from phitune.errors import ModelError

    coders = [Coder.of(tokenizer, "instruct")]
    with contextlib.suppress(ModelError):  # Then the other is used.
        coders.append(Coder.of(tokenizer, "chat"))
    for number, coder in enumerate(coders):
        turns = (Turn("user", "What is it?\n aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"),)
        ids = coder.encode(turns)
        coder.decode_answer(ids, ids)
        into = run / str(number)
        into.mkdir()
        coder.save(into)


def _forward(decoder: Any) -> None:
    """Logits of four tokens, whatever they are."""
    import torch

    with torch.no_grad():
        ids = torch.arange(4) % decoder.config.vocab_size
        logits = decoder.logits(decoder(ids, torch.arange(4), (0, 4)))
    assert logits.shape == (4, decoder.config.vocab_size)


def main() -> None:
    from fuzz import flags_of, in_processes

    flags = flags_of(__doc__ or "", CASES)
    started = time.perf_counter()
    found = _joined(in_processes(campaign, flags))
    seconds = time.perf_counter() - started
    for failure in found.failures[:20]:
        print(json.dumps(failure, indent=1).replace("\\n", "\n"))
    _save(found, flags.seed, seconds)


def _save(found: Found, seed: int, seconds: float) -> None:
    from contradictions import ADAPTER_WAYS, MODEL_WAYS
    from machine import save
    from model_damage import DAMAGES

    outcomes = ("loaded", "refused", "failed")
    total = {o: sum(n for key, n in found.outcomes.items() if key.endswith(o)) for o in outcomes}

    def table(name: str, keys: Any, counted: Counter[str]) -> list[str]:
        rows = [
            f"| {key} | " + " | ".join(f"{counted[f'{key}/{o}']:,}" for o in outcomes) + " |"
            for key in keys
        ]
        return [f"| {name} | loaded | refused | failed |", "|---|---|---|---|", *rows]

    lines = [
        f"{sum(total.values()):,} damaged folders in {seconds:.0f} s (seed {seed}):"
        f" {total['loaded']:,} loaded and answered, {total['refused']:,} refused with the place,"
        f" {total['failed']:,} failed. The longest took"
        f" {found.longest['used']:.1f} s of processor time; the process never"
        f" had more than {found.peak_memory / 2**20:,.0f} MiB.",
        "",
        *table("folder", _KINDS, found.outcomes),
        "",
        *table("damage (one to three a case)", sorted(DAMAGES), found.damages),
        "",
        *table("contradiction", sorted({**MODEL_WAYS, **ADAPTER_WAYS}), found.damages),
    ]
    details = {"seed": seed, "seconds": round(seconds), "longest": found.longest}
    counts = {"outcomes": dict(found.outcomes), "damages": dict(found.damages)}
    save("fuzz_models", "Damaged model and adapter folders", lines, {**details, **counts})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _run_cases(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        main()
