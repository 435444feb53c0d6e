"""The command line: call one command, turn errors into exit codes.

A command is a module of `commands/`, imported when it is asked for: `phitune --help` must answer at
once.

Exit codes: 0 done, 1 failed, 2 wrong usage, settings, data or model files, 3 the numbers stopped
being finite, 4 out of memory, 129 hung up, 130 interrupted, 143 terminated.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence

from phitune import __version__
from phitune.commands.help import Help, shipped_help
from phitune.environment import find_folders, lose_output, open_streams
from phitune.errors import Interrupted, PhituneError, SettingsError, without_tokens
from phitune.text import shortened, visible

EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "PHITUNE_DEBUG"
DESCRIPTION = "Fine-tune Phi-2, Phi-3.5 and their siblings with LoRA on the machine you own."
_HELP = (["-h"], ["--help"])
MAX_LINE = 1000  # characters of an error's line that are shown
# Each is a module of `commands`, imported when it is asked for; all but train, which `main` calls
# itself, have `run(argv) -> exit code`.
COMMANDS = {
    "demo": "teach a tiny shipped model to talk like a sea captain, in about a minute",
    "train": "fine-tune a model on a file of prompts and responses",
    "ask": "ask a base model or a fine-tuned one a single question",
    "chat": "chat with a base model or a fine-tuned one",
    "compare": "show the answers of the base model and of adapters side by side",
    "serve": "answer programs over HTTP, as a base model and adapters, in OpenAI's form",
    "evaluate": "measure what a fine-tune changed: loss, answers, forgetting",
    "export": "write an adapter for PEFT, merged into its model, or for llama.cpp, and verify it",
    "check": "show what is in a data set, and what will be trained on it",
    "plan": "show what a run would take: memory, time, and which settings fit",
    "layers": "show what a model is made of, and which layers your data would change most",
    "ui": "show a page: prepare, start and watch runs, talk to adapters, export them",
    "doctor": "show what this machine has, and what training would use of it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; no traceback reaches the terminal."""
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a letter of some answer must not end a run.
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"] and (not words[1:] or words[1] in COMMANDS):
        words = [*words[1:2], "--help"]
    try:
        if not words:
            print(_help(), file=sys.stderr)
            code = SettingsError.exit_code
        elif text := _said_at_once(words):
            print(text)
            code = 0
        else:
            find_folders()
            if words[0] == "train":
                # The main job: `train` and the loop `fit` are all that lies before a step.
                from phitune.commands.train import job_of

                job = job_of(words[1:])
                outcome = job.trainer.train()
                if job.as_json:
                    from phitune.commands.terminal import print_json

                    print_json(outcome)
                code = 0
            else:
                code = _run(words)
    except BaseException as error:  # Whatever ends a command is an exit code.
        code = _exit_code(error, words)
    try:
        sys.stdout.flush()  # What fails now would fail behind our back.
    except OSError as error:
        return _output_failed(error)
    return code


def _exit_code(error: BaseException, words: list[str]) -> int:
    """Says what ended a command, and what the right line would have been if it was a wrong one."""
    match error:
        case SystemExit():  # argparse, once its help is shown.
            return int(error.code or 0)
        case PhituneError() if error.exit_code == SettingsError.exit_code:
            from phitune.commands.guesses import advice

            _print_error(f"{error}{advice(words, list(COMMANDS))}")
            return error.exit_code
        case PhituneError() | Interrupted():
            _print_error(str(error))
            return error.exit_code
        case KeyboardInterrupt():
            _print_error("interrupted")
            return EXIT_INTERRUPTED
        case OSError():
            return _system_failed(error)
    # The last resort: a fault of ours, reported without a traceback.
    import traceback

    trace = without_tokens("".join(traceback.format_exception(error)))
    if os.environ.get(DEBUG_VARIABLE):
        print(trace, file=sys.stderr)
        return 1
    _print_error(
        f"internal error: {type(error).__name__}: {error}\n"
        f"This is a fault of phitune, please report it with {_written(trace)}"
    )
    return 1


def _system_failed(error: OSError) -> int:
    """Says what the system refused, and where."""
    if not error.filename:  # Of a file that was being written, or of standard output.
        try:
            print(flush=True)
        except OSError as still:
            return _output_failed(still)
    if isinstance(error, BrokenPipeError):
        return _output_failed(error)
    where = f"{error.filename}: " if error.filename else ""
    what = str(error.strerror or error)
    if "temporary directory" in what:
        what += "; name a folder that can be written to with the variable TMPDIR"
    _print_error(where + what)
    return 1


def _output_failed(error: OSError) -> int:
    """The reader of our output left, which is no news to anyone, or its disk is full."""
    lose_output(sys.stdout)
    if not isinstance(error, BrokenPipeError):
        _print_error(f"standard output: {error.strerror or error}")
    return 1


def _written(trace: str) -> str:
    """Where a traceback was written, or how to see it."""
    import tempfile

    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="phitune-",
            suffix=".log",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as log:
            log.write(trace)
    except OSError:
        return f"what it prints where {DEBUG_VARIABLE}=1 is set"
    return log.name


def _print_error(what: str) -> None:
    """Prints an error. What it quotes may come from anywhere: made harmless, and kept short."""
    lines = [
        "".join(shortened(line, MAX_LINE, MAX_LINE // 4))
        for line in visible(without_tokens(what)).split("\n")
    ]
    try:
        print("phitune: " + "\n".join(lines), file=sys.stderr, flush=True)
    except OSError:  # Where nobody listens, the exit code still says it.
        lose_output(sys.stderr)


def _said_at_once(words: list[str]) -> str:
    """What is printed where no command has to be loaded: version and help; else empty."""
    if words[0] in ("--version", "version"):
        return f"phitune {__version__}"
    if words[:1] in _HELP:
        return _help()
    if words[0] in COMMANDS and words[1:] in _HELP and (shown := shipped_help(words[0])):
        return shown.text()
    return ""


def _run(argv: list[str]) -> int:
    word = argv[0]
    if word in COMMANDS:
        code: int = importlib.import_module(f"phitune.commands.{word}").run(argv[1:])
        return code

    from phitune.neighbours import unknown_name

    what = unknown_name(word, COMMANDS, kind="command")
    raise SettingsError(f"{what}\nRun 'phitune --help' for all commands.")


def _help() -> str:
    options = {
        "-h, --help": "show this text; after a command, its flags",
        "--version": "show the version",
    }
    groups = {"commands": COMMANDS, "options": options}
    return Help("phitune COMMAND [flags]", DESCRIPTION, groups).text()
