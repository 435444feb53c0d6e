"""Flags of the commands that open a trained model: which one, where it runs, how it answers."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phitune.commands.flags import Parser

if TYPE_CHECKING:
    from phitune.inference.sampling import Sampling
    from phitune.inference.served import ServedModel


def add_model_flags(parser: Parser, *, several: bool = False) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--adapter_path",
        type=Path,
        action="append",
        default=[],
        metavar="RUN_OR_ADAPTER",
        help="a run directory or an adapter folder" + ("; may be given again" if several else ""),
    )
    group.add_argument(
        "--model_name",
        metavar="TEXT",
        help="the base model (default: the one the adapter names): a hub id, a local folder, or a"
        " shipped model",
    )
    group.add_argument(
        "--prompt_format",
        choices=("instruct", "chat"),
        help="default: the one the adapter was trained in",
    )
    group.add_argument(
        "--device", type=device_name, default="auto", metavar="auto|cpu|cuda|mps", help="[auto]"
    )
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the base [auto]"
    )


def add_sampling_flags(parser: Parser, *, max_new_tokens: int, temperature: float = 0.0) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max_new_tokens",
        type=VALUES["max_new_tokens"],
        default=max_new_tokens,
        metavar="N",
        help=f"of an answer [{max_new_tokens}]",
    )
    group.add_argument(
        "--temperature",
        type=VALUES["temp"],
        default=temperature,
        metavar="X",
        help=f"0 takes the most probable token, 1 draws by probability [{temperature:g}]",
    )
    group.add_argument(
        "--top_p",
        type=VALUES["top_p"],
        default=1.0,
        metavar="X",
        help="draw among the fewest tokens whose probabilities reach this sum [1]",
    )
    group.add_argument(
        "--top_k",
        type=VALUES["top_k"],
        default=0,
        metavar="N",
        help="draw among so many most probable tokens; 0: all [0]",
    )
    group.add_argument(
        "--repetition_penalty",
        type=VALUES["repetition_penalty"],
        default=1.0,
        metavar="X",
        help="above 1, tokens that were there already are less probable [1]",
    )
    group.add_argument(
        "--seed", type=VALUES["seed"], default=42, metavar="N", help="of what is drawn [42]"
    )


def one_adapter(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuses a second --adapter_path where only one can be used."""
    if len(arguments.adapter_path) > 1:
        parser.error("--adapter_path was given more than once; phitune compare takes several")


def sampling_of(arguments: argparse.Namespace) -> "Sampling":
    from phitune.inference.sampling import Sampling

    return Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        arguments.repetition_penalty,
        arguments.seed,
    )


def open_from(arguments: argparse.Namespace) -> "ServedModel":
    """Loads what `add_model_flags` asked for; without adapter and name the default base model."""
    from phitune.config import Settings
    from phitune.inference.served import open_model

    name = arguments.model_name
    if not arguments.adapter_path:
        name = name or Settings.model_fields["model_name"].default
    return open_model(
        arguments.adapter_path,
        model_name=name,
        prompt_format=arguments.prompt_format,
        device=arguments.device,
        precision=arguments.precision,
    )


def device_name(text: str) -> str:
    """A device as settings spell it; whether the machine has it is known later."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text}: must be auto, cpu, cuda, cuda:N or mps")
    return text


def whole(name: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers of `least` or more, and no more than `most`."""

    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            allowed = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number {allowed}")
        return value

    check.__name__ = name
    return check


def real(name: str, least: float, most: float, *, above: bool = False) -> Callable[[str], Any]:
    """A parser of numbers from `least` to `most`; with `above`, not `least` itself."""

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"{text}: must be a number {'above' if above else 'from'} {least:g}"
                f" {'and at most' if above else 'to'} {most:g}"
            )
        return value

    check.__name__ = name
    return check


# What each may be, for flags and for whoever asks again later.
VALUES: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": whole("max_new_tokens", 1),
    "temp": real("temperature", 0.0, 10.0),
    "top_p": real("top_p", 0.0, 1.0, above=True),
    "top_k": whole("top_k", 0),
    "repetition_penalty": real("repetition_penalty", 0.0, 10.0, above=True),
    # Seeds of rows and turns are added to it; a generator takes 64 bits.
    "seed": whole("seed", 0, 2**62),
}
