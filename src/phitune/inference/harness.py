"""Base and adapter through the LM Evaluation Harness, which is imported here and nowhere else.

The harness measures; what is added are intervals of the differences, from its figures of each
question, where its own figure is a mean of these. It asks for likelihoods of text and for text, and
knows no tokens: texts are encoded as its own transformers backend does it, with one exception: a
question in the trained format (`apply_chat_template`) has exactly the tokens of training.

Tasks that run code which the model writes are refused.
"""

import contextlib
import difflib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from phitune.data.conversation import Turn
from phitune.data.prompt import Segment
from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.errors import DataError, ModelError, SettingsError, listing
from phitune.inference.evaluate import Better, Measure
from phitune.inference.generate import Decoding, Sampling, stream
from phitune.inference.loaded import LoadedModel
from phitune.inference.scores import (
    BASE,
    TUNED,
    PairedDifference,
    Progress,
    Transform,
    paired_difference,
    token_losses,
)
from phitune.model.lora import Adapters

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise SettingsError(
        f"--tasks needs the LM Evaluation Harness, and {error.name} is not installed:"
        " pip install 'phitune[eval]'"
    ) from None

_NAME = "lm_eval"
_SAME = 1e-6
_MAX_NEW_TOKENS = 256  # the harness' own, where a task names none
_SEQUENCES = 32
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
# What a task may ask of generation besides: its value where it changes nothing.
_NEUTRAL = {"num_beams": 1, "min_length": 0, "num_return_sequences": 1}


@dataclass(frozen=True)
class HarnessTasks:
    """What a user asked of the harness."""

    names: tuple[str, ...]
    include_path: Path | None
    num_fewshot: int | None  # None: as the task says
    limit: int | None  # questions of each task; None: all
    apply_chat_template: bool
    seed: int


@dataclass(frozen=True)
class TaskResults:
    """The harness' figures, and ours on their differences."""

    measures: tuple[Measure, ...]
    base: dict[str, Any]  # by task, as the harness has it
    tuned: dict[str, Any]
    version: str


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars and log lines of the harness; what fails is raised."""
    for name in (_NAME, "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@_quietly()
def load_tasks(tasks: HarnessTasks) -> Any:
    """The tasks with their data, which the harness fetches where it is not local.

    Raises:
        SettingsError: unknown names, no such folder.
        DataError: a task that cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    if not tasks.names:
        raise SettingsError("--tasks: names no task")
    if tasks.include_path and not tasks.include_path.is_dir():
        raise SettingsError(f"--include_path {tasks.include_path}: there is no such folder")
    try:
        include = str(tasks.include_path) if tasks.include_path else None
        manager = TaskManager(include_path=include)
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise DataError(f"--include_path {tasks.include_path}: {error}") from None
    known = set(manager.all_tasks)
    unknown = []
    for name in tasks.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            unknown.append(name + (f"; did you mean {', '.join(near)}?" if near else ""))
    if unknown:
        raise SettingsError(f"--tasks: the harness knows no task of this name:\n{listing(unknown)}")
    try:
        loaded_tasks = manager.load(list(tasks.names))
    except (OSError, ValueError, KeyError, TypeError, ImportError, yaml.YAMLError) as error:
        said = str(error).strip().splitlines() or [""]
        raise DataError(
            f"--tasks {','.join(tasks.names)}: cannot be loaded: {type(error).__name__}: {said[0]}"
        ) from None
    for name, task in loaded_tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise SettingsError(
                f"--tasks {name}: runs code that the model writes, which phitune never does; use"
                " the harness itself on an export (phitune export --format merged)"
            )
        if tasks.num_fewshot is not None:
            if task.get_config("num_fewshot") == 0 and tasks.num_fewshot:
                raise SettingsError(
                    f"--num_fewshot {tasks.num_fewshot}: task {name} is defined without examples"
                )
            task.set_config(key="num_fewshot", value=tasks.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded_tasks


@_quietly()
def evaluate_tasks(
    loaded: LoadedModel, tasks: HarnessTasks, loaded_tasks: Any, progress: Progress
) -> TaskResults:
    """Both models through the same tasks, one after the other."""
    from importlib.metadata import version

    from lm_eval.evaluator import evaluate

    found = []
    for choice, who in ((BASE, "base"), (TUNED, "tuned")):
        for task in loaded_tasks["tasks"].values():
            task.set_fewshot_seed(seed=tasks.seed)
        model = HarnessModel(
            loaded,
            choice,
            in_trained_format=tasks.apply_chat_template,
            seed=tasks.seed,
            progress=_prefixed(f"{who}: ", progress),
        )
        results = evaluate(
            model,
            loaded_tasks,
            limit=tasks.limit,
            apply_chat_template=tasks.apply_chat_template,
            fewshot_as_multiturn=tasks.apply_chat_template,
            # Its errors of a single model; of a mean they need no draws.
            bootstrap_iters=1000,
        )
        assert results is not None
        found.append(results)
    base, tuned = found
    measures = [
        measure
        for task in base["results"]
        for measure in _measures_of(task, base, tuned, tasks.seed)
    ]
    return TaskResults(tuple(measures), base["results"], tuned["results"], version(_NAME))


def _prefixed(prefix: str, progress: Progress) -> Progress:
    def show(what: str, done: int, total: int) -> None:
        progress(prefix + what, done, total)

    return show


def _measures_of(task: str, base: Any, tuned: Any, seed: int) -> list[Measure]:
    measures = []
    higher_is_better = base.get("higher_is_better", {}).get(task, {})
    for key, value in base["results"][task].items():
        metric, comma, chosen = key.partition(",")
        other = tuned["results"][task].get(key)
        numbers = isinstance(value, int | float) and isinstance(other, int | float)
        if not comma or metric.endswith("_stderr") or not numbers:
            continue
        of_base, of_tuned = (_of_questions(one, task, metric, chosen) for one in (base, tuned))
        figures = paired(of_base, of_tuned, float(value), float(other), seed)
        better: Better | None = None
        if metric in higher_is_better and higher_is_better[metric] is not None:
            better = "higher" if higher_is_better[metric] else "lower"
        name = f"{task}, {metric}" + ("" if chosen == "none" else f" ({chosen})")
        measures.append(Measure(name, figures, better))
    return measures


def _of_questions(found: Any, task: str, metric: str, chosen: str) -> list[Any]:
    samples = (found.get("samples") or {}).get(task, [])
    return [sample[metric] for sample in samples if sample["filter"] == chosen and metric in sample]


def paired(
    base: Sequence[Any], tuned: Sequence[Any], of_base: float, of_tuned: float, seed: int
) -> PairedDifference:
    """The harness' two figures with an interval, where they are a mean of its figures of each
    question, or of (log-probability, length) pairs; without one elsewhere.
    """
    for reading in _readings(base, tuned):
        ours = paired_difference(
            reading.base, reading.tuned, reading.weights, seed=seed, transform=reading.transform
        )
        if _close(ours.base, of_base) and _close(ours.tuned, of_tuned):
            return ours
    return PairedDifference(of_base, of_tuned, len(base))


_Array = NDArray[np.float64]


class _Reading(NamedTuple):
    """One way to make a figure of those of n questions: sum / weight, transformed."""

    base: _Array  # [n]
    tuned: _Array  # [n]
    weights: _Array | None = None  # [n]
    transform: Transform | None = None


def _readings(base: Sequence[Any], tuned: Sequence[Any]) -> list[_Reading]:
    """Ways in which the harness makes one figure of many."""
    if len(base) != len(tuned) or not base:
        return []
    values = [*base, *tuned]
    if all(isinstance(value, int | float) for value in values):
        first, second = np.array(base, float), np.array(tuned, float)
        return [_Reading(first, second), _Reading(first, second, None, _exp_of_minus)]
    if all(isinstance(value, tuple | list) and len(value) == 2 for value in values):
        first, second = (np.array([value[0] for value in part], float) for part in (base, tuned))
        weights = np.array([value[1] for value in base], float)
        return [_Reading(first, second, weights, transform) for transform in (_exp_of_minus, _bits)]
    return []


def _exp_of_minus(values: _Array) -> _Array:
    result: _Array = np.exp(-values)
    return result


def _bits(values: _Array) -> _Array:
    return -values / math.log(2)


def _close(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=_SAME, abs_tol=_SAME)


# --- our model as a model of the harness ----------------------------------------------------------


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Base (None) or adapter of a loaded model, as the harness wants it."""

    def __init__(
        self,
        loaded: LoadedModel,
        choice: int | None,
        *,
        in_trained_format: bool,
        seed: int = 42,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        super().__init__()
        self._loaded, self._choice, self._seed = loaded, choice, seed
        self._progress = progress
        self._in_trained_format = in_trained_format
        self._tokenizer = loaded.coder(choice).tokenizer
        self._format = loaded.coder(choice).prompt_format
        question = (Turn("user", "a"), Turn("assistant", "b"))
        trained = next(part for part in self._format.segments(question) if part.trained)
        self._answer_start = trained.text.removesuffix("b")  # the space after "Output:"
        self._device = loaded.decoder.device
        self.max_length = loaded.decoder.config.max_position_embeddings

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        tokenizer = self._tokenizer
        return tokenizer.token_id(tokenizer.special_tokens["eos_token"])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        tokenizer = self._tokenizer
        bos = tokenizer.special_tokens.get("bos_token")
        return tokenizer.token_id(bos) if bos else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids, with special tokens in the text taken as such, and the token that a tokenizer puts
        in front, unless it is there or the trained format has none.
        """
        tokenizer = self._tokenizer
        ids = tokenizer.encode([Segment(string, control=True)])
        adds = add_special_tokens is not False and not self._in_trained_format
        if tokenizer.bos_token and adds and ids[:1] != [tokenizer.token_id(tokenizer.bos_token)]:
            ids.insert(0, tokenizer.token_id(tokenizer.bos_token))
        return ids

    # --- likelihoods ------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation."""
        rows = []
        for _request, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            given = max(len(ids) - len(continuation), 1)
            rows.append(TokenizedExample(ids, [IGNORE_INDEX] * given + ids[given:]))
        # Longest first: what does not fit shows at once.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        scored = token_losses(
            self._loaded.decoder,
            self._loaded.on_decoder,
            (self._choice,),
            (rows[index] for index in order),
        )
        for done, (index, (losses,)) in enumerate(zip(order, scored, strict=True), start=1):
            found[index] = (-float(losses.losses.sum()), bool(losses.is_greedy.all()))
            self._progress("likelihoods", done, len(rows))
        return found

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of whole texts, in windows of the model's length."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    # --- text -------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers, each up to the first of its stop texts, an end token or its length."""
        found = [""] * len(requests)
        done = 0
        for batch, until, limit, sampling in self._generations(requests):
            prompts = [self._prompt(requests[index].args[0], limit) for index in batch]
            texts = self._until(prompts, until, limit, sampling)
            for index, text in zip(batch, texts, strict=True):
                found[index] = text
            done += len(batch)
            self._progress("answers", done, len(requests))
        return found

    def _generations(
        self, requests: Sequence[Any]
    ) -> Iterator[tuple[list[int], list[str], int, Sampling]]:
        """Requests that ask for the same, in batches."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for group in groups.values():
            asked = dict(normalize_gen_kwargs(requests[group[0]].args[1], _MAX_NEW_TOKENS))
            until = [text for text in asked.pop("until") if text]
            limit, draws = int(asked.pop("max_gen_toks")), asked.pop("do_sample")
            if limit >= self.max_length:
                raise ModelError(
                    f"a task asks for answers of {limit} tokens; the model's positions end at"
                    f" {self.max_length}"
                )
            options = {name: asked.pop(name) for name in _SAMPLING if name in asked}
            if not draws:
                options.pop("temperature", None)
            if other := {k: v for k, v in asked.items() if v is not None and _NEUTRAL.get(k) != v}:
                raise ModelError(f"a task uses generation options that are not supported: {other}")
            sampling = Sampling(**options, seed=self._seed)
            for start in range(0, len(group), _SEQUENCES):
                yield group[start : start + _SEQUENCES], until, limit, sampling

    def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
        """Ids of a context; of one that is too long, the end."""
        if self._in_trained_format:
            context = context.removesuffix(self._answer_start)
        return self.tok_encode(context)[-(self.max_length - max_new_tokens) :]

    def _until(
        self, prompts: list[list[int]], until: list[str], limit: int, sampling: Sampling
    ) -> list[str]:
        loaded = self._loaded
        answers: list[list[int]] = [[] for _ in prompts]

        def text(row: int) -> str:
            # Decoded alone, as the harness' own backend does: of a text that begins, some
            # tokenizers drop the first space.
            before = prompts[row] if self._in_trained_format else []
            return self._tokenizer.decode_answer(answers[row], before)

        decoding = Decoding(limit, loaded.coder(self._choice).stop_ids, sampling)
        adapters = Adapters(loaded.on_decoder, [self._choice] * len(prompts))
        complete: set[int] = set()
        for tokens in stream(loaded.decoder, prompts, decoding, adapters, complete=complete):
            for row, token in tokens:
                answers[row].append(token)
                if any(stop in text(row) for stop in until):
                    complete.add(row)
        texts = [text(row) for row in range(len(prompts))]
        if self._in_trained_format:
            texts = [self._format.response(text) for text in texts]
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    # --- the trained format ----------------------------------------------------------------

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the trained format.

        It ends with what an answer begins with (the space after `Output:`), which the harness moves
        to the continuations it asks about; or, without `add_generation_prompt`, with the beginning
        of an answer.
        """
        roles = ("system", "user", "assistant")
        if unknown := {message["role"] for message in chat_history} - set(roles):
            raise ModelError(f"a task has turns of {', '.join(sorted(unknown))}; known are {roles}")
        turns: Any = [Turn(message["role"], message["content"]) for message in chat_history]  # type: ignore[arg-type]
        segments = self._format.segments(turns)
        if turns[-1].role == "assistant" and not add_generation_prompt:
            segments = segments[:-1]
        text = "".join(segment.text for segment in segments)
        return text + self._answer_start if add_generation_prompt else text

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self._format.chat_template if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.folder).replace("/", "__")
