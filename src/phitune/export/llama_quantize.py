"""Quantisations that only llama.cpp's own tool can make."""

import os
import shutil
import subprocess
from pathlib import Path

from phitune.errors import ExportError

TOOL = "llama-quantize"
_LINES_OF_LOG = 8


def require_tool(quantization: str, adapter_path: Path) -> str:
    """The path of llama-quantize.

    Raises:
        ExportError: it is not on PATH.
    """
    tool = shutil.which(TOOL)
    if tool is None:
        raise ExportError(
            f"--quantization {quantization} is made by llama.cpp's own {TOOL}, and there is none on"
            " PATH; install llama.cpp, or export f16 and run it where there is one:\n"
            f"  phitune export --adapter_path {adapter_path} --format gguf --quantization f16"
            " --output_dir F16\n"
            f"  {TOOL} F16/model-f16.gguf model-{quantization}.gguf {quantization.upper()}"
        )
    return tool


def quantize(tool: str, source: Path, destination: Path, quantization: str, threads: int) -> None:
    """Runs it.

    Raises:
        ExportError: it failed, with the end of what it said.
    """
    command = [tool, str(source), str(destination), quantization.upper(), str(threads)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode or not destination.is_file():
        end = done.stdout.strip().splitlines()[-_LINES_OF_LOG:]
        raise ExportError("\n  ".join([f"{tool} failed (exit code {done.returncode}):", *end]))
