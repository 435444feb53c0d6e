"""Where the model runs, in which precision, whether it is compiled; and its memory while it runs.

`guard_memory` turns every way in which an allocation fails (torch, the C library, oneDNN) into one
type of error; engines call it, nobody else has to know. On a CPU the C library can keep freed
buffers for the next of their kind, which is faster, or give them back, which takes less.

Not here: how much memory there is and what a run may plan with (plan/machine.py).
"""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import mmap
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, Literal, TypeVar

import torch

from phitune.errors import OutOfMemoryError, SettingsError
from phitune.model.decoder import Decoder, DecoderLayer

# -------------------------------------------------------------------------------------------------
# Memory while a model runs: what the C library keeps, and what happens where an allocation fails.

T = TypeVar("T")

_RESERVE_BYTES = 32 * 2**20
# Of mallopt, as glibc numbers them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# What torch says, and oneDNN where a product's program or scratch space cannot be allocated.
_NO_PRODUCT = r"could not (create|execute) a primitive"
_NO_MEMORY = re.compile(
    rf"can't allocate memory|out of memory|bad_alloc|can't start new thread|{_NO_PRODUCT}"
    # cuBLAS has no memory for its workspace, or for itself.
    r"|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    # MLX, and Metal below it.
    r"|Unable to allocate|Attempting to allocate|Insufficient Memory"
)


def keep_freed_memory() -> None:
    """Has the C library (glibc) keep large buffers that were freed, for the next of their kind.

    By default each comes from the system anew, page by page and filled with zeros, at every
    micro-batch. `release_freed_memory` gives them back, at the end of a step.
    """
    _keep_freed_memory(from_bytes=2**30, at_most=2**31 - 1)


def stop_keeping_freed_memory() -> None:
    """The opposite: every buffer of some size goes back to the system at once."""
    _keep_freed_memory(from_bytes=2**17, at_most=2**17)


def _keep_freed_memory(from_bytes: int, at_most: int) -> None:
    """
    Args:
        from_bytes: a buffer of this size comes from the system, and goes back to it at once.
        at_most: bytes that were freed and are kept.
    """
    if _has_glibc():
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, from_bytes)
        library.mallopt(_M_TRIM_THRESHOLD, at_most)


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system, where the C library can (glibc).

    Rows of many lengths leave holes of many sizes; without this a process grows from step to step.
    """
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; on a CPU torch says so in words only."""
    kinds = (OutOfMemoryError, torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or bool(
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    )


class _ThisThread(threading.local):
    makes_products = True


_THIS_THREAD = _ThisThread()


def guard_memory(work: Callable[[], T], device: torch.device) -> T:
    """Work that computes on a device, with one type of error where memory runs out.

    Raises:
        OutOfMemoryError: an allocation failed. What was held but not used is given back by then,
            and nothing holds the tensors of the attempt any more.
    """
    try:
        return in_usable_thread(work)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    # Only here, behind the clause, the frames of the attempt are gone.
    give_back_memory(device)
    raise OutOfMemoryError(reason)


def first_line(error: BaseException) -> str:
    """What the allocator said, in one line; a MemoryError often says nothing."""
    line = (str(error).splitlines() or ["no memory is left"])[0]
    return line[max(line.find("DefaultCPUAllocator"), 0) :]


def in_usable_thread(work: Callable[[], T]) -> T:
    """Does work that has matrix products in it: here, or in a new thread if this one makes none.

    A thread in which oneDNN once failed to allocate a product's program fails ever after, however
    much is free: the error is kept for each thread and never cleared (uxlfoundation/oneDNN#5907).
    """
    if not _THIS_THREAD.makes_products:
        return _in_new_thread(work)
    try:
        return work()
    except RuntimeError as error:
        _THIS_THREAD.makes_products = not re.search(_NO_PRODUCT, str(error))
        raise


def _in_new_thread(work: Callable[[], T]) -> T:
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # Raised again by who waits.
            failed.append(error)

    # A daemon: a second Ctrl-C leaves at once.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed.pop()
    return done.pop()


class _Reserve:
    """Mapped and never used, so it takes no memory, but counts below a limit of what is mapped."""

    mapped: mmap.mmap | None = None


_RESERVE = _Reserve()


def hold_reserve() -> None:
    """Reserves a few pages for the time after an allocation failed; see `give_back_memory`.

    Freed buffers are used again but stay mapped, so small things that need pages of their own, a
    thread's stack or a program that oneDNN makes, might then find none below a limit. Linux alone
    has such limits.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        _RESERVE.mapped = _RESERVE.mapped or mmap.mmap(-1, _RESERVE_BYTES)


def give_back_memory(device: torch.device) -> None:
    """Returns what is held but not used to the device, after memory ran out.

    On a CPU no freed buffer is kept from then on: fragments cost more memory than is in use, and
    there is none to spare.
    """
    gc.collect()
    if mlx := sys.modules.get("mlx.core"):
        mlx.clear_cache()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        if _RESERVE.mapped:
            _RESERVE.mapped.close()
            _RESERVE.mapped = None
        stop_keeping_freed_memory()
        release_freed_memory()


# -------------------------------------------------------------------------------------------------
# Device, precision and compilation.

MLX = "mlx"  # Apple's library, as a device; see apple/
CACHED_PRODUCTS = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(name: str) -> str:
    """The device asked for; "auto" prefers CUDA, then Apple's GPU through MLX, then the CPU.

    Where MLX is missing, "auto" takes Apple's GPU through torch ("mps"). On CUDA torch's attention,
    with which models answer and are evaluated, leaves cuDNN alone from then on: it plans anew for
    every length, which took 5 ms of the 14 ms of a token.

    Returns: a name that `torch_device` takes: cpu, cuda, cuda:N, mps or mlx.

    Raises:
        SettingsError: the machine does not have it.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
        if not cuda and mps:
            name = "mps" if mlx_refusal() else MLX
    if name == MLX and (refusal := mlx_refusal()):
        raise SettingsError(f"device mlx: {refusal}")
    device = torch_device(name)
    if device.type == "cuda" and not cuda:
        built = "" if torch.version.cuda else "; this torch is built without CUDA"
        raise SettingsError(f"device {name}: no CUDA device found{built}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not mps:
        raise SettingsError(f"device {name}: no Apple GPU found")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return name


def torch_device(name: str) -> torch.device:
    """Where torch's tensors are while a device of this name computes; with MLX on the CPU."""
    return torch.device("cpu" if name == MLX else name)


@functools.cache
def mlx_refusal() -> str:
    """Why MLX cannot compute here, with the remedy; "" where it can."""
    try:
        import mlx.core as mx

        mx.eval(mx.zeros(1))
    except ImportError as error:
        if importlib.util.find_spec("mlx"):
            return f"MLX is installed, but cannot be loaded: {first_line(error)}"
        if sys.platform == "darwin" and platform.machine() != "arm64":
            return "MLX needs a Mac with Apple's processor"
        wanted = "mlx" if sys.platform == "darwin" else "'phitune[apple]'"
        return f"MLX is not installed; pip install {wanted}"
    except RuntimeError as error:
        return f"MLX does not run here: {first_line(error)}"
    return ""


def device_name(name: str) -> str:
    """The processor or card of a device, as far as it decides how sums are rounded."""
    if name == MLX:
        import mlx.core as mx

        return f"MLX {version('mlx')} on {mx.device_info()['device_name']}"
    device = torch.device(name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU, {platform.processor()}"
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: str) -> str:
    """The precision of the frozen base: bf16 where the device computes in it fast, else fp32.

    Never fp16: its range overflows in Phi-2's attention.
    """
    if name != "auto":
        return name
    if device.startswith("cuda"):
        # Cards before Ampere only emulate it.
        is_fast = torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
        return "bf16" if is_fast else "fp32"
    if device == MLX:
        import mlx.core as mx

        return "bf16" if mx.metal.is_available() else "fp32"  # Its CPU only emulates it.
    return "bf16" if device == "mps" else "fp32"


def compile_refusal(device: torch.device, wanted: bool) -> str | None:
    """Why nothing is compiled on a device, for the user; None where it is dependable and pays."""
    if not wanted:
        return "off, as asked"
    if device.type == "cpu":
        # Measured in docs/lab-notes.md: the GEMMs decide, and the first step would wait.
        return "not used: on a CPU the compiler costs more time than it saves"
    if device.type == "mps":
        return "not used: the compiler is not dependable on Apple's GPU"
    if not _has_c_compiler():
        return "not used: it needs a C compiler (gcc or clang), and there is none on PATH"
    if why_not := _why_not_compiled(device.type):
        return f"not used: the compiler does not run here ({why_not})"
    return None


@functools.cache
def _why_not_compiled(kind: str) -> str:
    """Compiles the smallest of programs. Returns: why that failed, "" where it did not."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=kind))  # [8]
    except Exception as error:  # Triton, a C compiler and Python's headers fail in many ways.
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def compile_layers(decoder: Decoder) -> None:
    """Compiles both halves of every layer of the plain decoder."""
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        force_compile(layer)


def force_compile(layer: DecoderLayer, backend: str = "inductor") -> None:
    """Compiles what comes before and after attention; the layers of a model share the result."""
    # Attention stays outside: it loops over sequences, whose number and lengths always change.
    layer.before_attention = torch.compile(  # type: ignore[method-assign]
        layer.before_attention, dynamic=True, backend=backend
    )
    layer.after_attention = torch.compile(  # type: ignore[method-assign]
        layer.after_attention, dynamic=True, backend=backend
    )


def limit_product_caches() -> None:
    """Makes oneDNN keep few of the programs that it makes for each shape of a product.

    There is a new shape for each number of tokens; by default it keeps a thousand, about half a
    MiB each. To be called before the first product. Making them again costs nothing measurable.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(CACHED_PRODUCTS))


def compile_seconds() -> float:
    """What torch.compile has cost this process so far."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("entire_frame_compile", 0.0))


@contextlib.contextmanager
def deterministic(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """In it, torch adds in the same order every time on CUDA, as it does on a CPU anyway.

    To be entered before the first product on the device.

    Raises:
        SettingsError: it is wanted on Apple's GPU, for which torch does not promise it.
    """
    if wanted and device.type == "mps":
        raise SettingsError("deterministic: torch has no such order on Apple's GPU; leave it out")
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fills: Any = torch.utils.deterministic
    were, filled = torch.are_deterministic_algorithms_enabled(), fills.fill_uninitialized_memory
    had_efficient = torch.backends.cuda.mem_efficient_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # Nothing here reads what it did not write.
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # It would be refused.
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(were)
        fills.fill_uninitialized_memory = filled
        torch.backends.cuda.enable_mem_efficient_sdp(had_efficient)


def _has_c_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
