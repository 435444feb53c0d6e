"""A GPU that is not there: programs run on it without a driver, and every operation is counted.

Tensors on "cuda:0" are fake: they have a shape, a type and a storage of a size, and no numbers.
What runs on the CPU runs for real. So a program takes the path that it would take on a GPU, and the
trace says what it asks of it: operations that wait for the GPU, copies from the host, kernels,
floating-point operations of its products, bytes that the other kernels read and write, and
allocations.

An operation counts as one kernel, flash attention's backward as four, a list of tensors as torch's
multi-tensor kernels split it. Bytes are those of the operands, each once, as no cache holds them.
"""

import ctypes
import itertools
import math
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import phitune

DEVICE = torch.device("cuda", 0)
PACKAGE = Path(phitune.__file__).parent
# torch's allocator on CUDA rounds up to this.
ALLOCATION_BYTES = 512
# What torch's kernels over lists take at a time.
LIST_TENSORS, LIST_BLOCKS, LIST_CHUNK = 64, 320, 65536
# A product with a dimension as small as this is bound by memory, not by arithmetic.
NARROW = 128

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
_ATTENTION = {"_flash_attention_forward", "_flash_attention_backward"}
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
_FREE |= {"set_", "resize_", "_unsafe_view", "_reshape_alias", "device", "detach", "is_pinned"}
_OVERWRITES = {"copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_", "random_"}
_OVERWRITES |= {"normal_", "uniform_"}
_KERNELS = {"_flash_attention_backward": 4}

# The table in which torch looks for that, and its order, as in c10/core/DeviceType.h.
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
_DEVICE_TYPES = ("cpu", "cuda", "mkldnn", "opengl", "opencl", "ideep", "hip", "fpga", "maia", "xla")
_DEVICE_TYPES += ("vulkan", "metal", "xpu", "mps", "meta")


@dataclass
class Counts:
    """What a part of a program asks of the GPU."""

    waits: Counter[str] = field(default_factory=Counter)  # by operation and line of the package
    staged: Counter[str] = field(default_factory=Counter)  # copies from memory that is not pinned
    kernels: Counter[str] = field(default_factory=Counter)  # by operation
    operations: set[str] = field(default_factory=set)  # with their overload, as add.Tensor
    product_flops: float = 0.0
    narrow_bytes: float = 0.0  # of products with a small dimension
    other_bytes: Counter[str] = field(default_factory=Counter)  # of all other kernels but attention
    peak_bytes: int = 0  # allocated

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()


class FakeGpu:
    """A context manager; in it, `DEVICE` can be computed on. Not to be nested."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.allocated = 0
        self._storages: dict[int, Any] = {}  # weak references, by address
        self._pinned: set[int] = set()  # storages on the host
        self._modes = ExitStack()

    def __enter__(self) -> "FakeGpu":
        self._modes.enter_context(_device_guard())
        self._modes.enter_context(
            patch.object(FakeTensor, "tolist", lambda tensor: self._to_list(tensor))
        )
        # What a program asks torch of a GPU.
        for module, name, answer in (
            (torch.cuda, "get_device_capability", (9, 0)),
            (torch.backends.cuda, "is_flash_attention_available", True),
        ):
            self._modes.enter_context(patch.object(module, name, return_value=answer))
        self._modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Functions(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()

    def replace(self, module: Any, name: str, value: Any) -> None:
        """Something of a module by something else, until the GPU is left."""
        self._modes.enter_context(patch.object(module, name, value))

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """What is asked of the GPU from here on."""
        before, self.counts = self.counts, Counts(peak_bytes=self.allocated)
        try:
            yield self.counts
        finally:
            self.counts = before

    def launch(self, kernel: Any, _: tuple[int, ...], *values: object, **constants: object) -> None:
        """A kernel of Triton's, which nobody runs: one launch, and its operands once."""
        name = str(getattr(kernel, "__name__", kernel))
        self.counts.kernels[name] += 1
        sizes = map(_size, tensors_in((values, constants)))
        self.counts.other_bytes[name] += float(sum(sizes))

    # Called by the modes.

    def note(self, name: str, func: Any, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        """Counts an operation that ran on the GPU."""
        counts = self.counts
        for tensor in tensors_in(out):
            self._hold(tensor)
        if name in _FREE or _is_view(func):
            return
        counts.kernels[name] += _kernels(name, args)
        counts.operations.add(str(func).removeprefix("aten."))
        if name in _PRODUCTS:
            shapes = [tensor.shape for tensor in tensors_in(args) if tensor.dim() > 1][-2:]
            rows, inner, columns = shapes[0][-2], shapes[0][-1], shapes[1][-1]
            batch = math.prod(shapes[0][:-2])
            if min(rows, inner, columns) <= NARROW:
                counts.narrow_bytes += _bytes(name, args, kwargs, out)
            else:
                counts.product_flops += 2.0 * batch * rows * inner * columns
        elif name in _ATTENTION:
            with self.temporary(_attention_bytes(name, args)):
                pass
        else:
            counts.other_bytes[name] += _bytes(name, args, kwargs, out)

    def wait(self, name: str) -> None:
        self.counts.waits[f"{name} at {_place()}"] += 1

    def staged(self, name: str) -> None:
        self.counts.staged[f"{name} at {_place()}"] += 1

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _to_list(self, tensor: Tensor) -> Any:
        self.wait("tolist")
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu").tolist()

    @contextmanager
    def temporary(self, size: int) -> Iterator[None]:
        """Memory that a kernel takes while it runs."""
        self._add(size)
        yield
        self.allocated -= size

    def _hold(self, tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor) or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        size = -(-storage.nbytes() // ALLOCATION_BYTES) * ALLOCATION_BYTES

        def freed(_: Any) -> None:
            del self._storages[address]
            self.allocated -= size

        self._storages[address] = weakref.ref(storage, freed)
        self._add(size)

    def _add(self, size: int) -> None:
        self.allocated += size
        self.counts.peak_bytes = max(self.counts.peak_bytes, self.allocated)


class _Operations(TorchDispatchMode):
    """Fake where the GPU takes part, real elsewhere."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # In inference mode they come here whole.
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs = list(tensors_in((args, kwargs)))
        from_gpu = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        device = kwargs.get("device")
        to = torch.device(device).type if device is not None else None
        if not from_gpu and to != "cuda":
            with no_dispatch():
                return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.gpu.wait("item")
            return 1.0 if args[0].is_floating_point() else 1
        if name == "_to_copy" and to == "cpu" and args[0].device.type == "cuda":
            self.gpu.wait("copy to the host")
            with no_dispatch():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name in ("_to_copy", "copy_"):
            self._copy_from_host(name, args, kwargs)
        if name == "_to_copy" and not from_gpu:
            dtype = kwargs.get("dtype") or args[0].dtype
            out = torch.empty(args[0].shape, dtype=dtype, device=DEVICE)
        else:
            out = func(*args, **kwargs)
        self.gpu.note(name, func, args, kwargs, out)
        return out

    def _copy_from_host(self, name: str, args: Sequence[Any], kwargs: Any) -> None:
        source = args[1] if name == "copy_" else args[0]
        if isinstance(source, FakeTensor) and source.device.type == "cuda":
            return
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if not asynchronous:
            self.gpu.wait("copy from the host")
        elif not self.gpu.is_pinned(source):
            self.gpu.staged("copy from the host")


class _Functions(TorchFunctionMode):
    """What a torch without CUDA refuses before it comes to an operation."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            return self.gpu.pin(args[0].clone())
        if func is Tensor.is_pinned:
            return self.gpu.is_pinned(args[0])
        if func is F.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            self.gpu.counts.kernels["scaled_dot_product_attention"] += 1
            return torch.empty_like(args[0])
        if "silu_backward" in str(func) and isinstance(args[0], FakeTensor):
            # One kernel on a GPU; a torch without it makes several operations of it.
            out = torch.empty_like(args[0])
            self.gpu.note("silu_backward", torch.ops.aten.silu_backward.default, args, kwargs, out)
            return out
        return func(*args, **kwargs)


@contextmanager
def _device_guard() -> Iterator[None]:
    """A torch without CUDA refuses its tensors where it would choose the current device. Here what
    chooses nothing, for meta tensors, stands in for that.
    """
    if torch.version.cuda:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * len(_DEVICE_TYPES)).in_dll(library, _GUARDS)
    before = guards[_DEVICE_TYPES.index("cuda")]
    guards[_DEVICE_TYPES.index("cuda")] = guards[_DEVICE_TYPES.index("meta")]
    try:
        yield
    finally:
        guards[_DEVICE_TYPES.index("cuda")] = before


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others on every device."""
    if func.namespace != "aten":
        return False
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(
        func.name(), "CPU"
    )


def _is_view(func: Any) -> bool:
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in func._schema.returns
    )


def _kernels(name: str, args: Sequence[Any]) -> int:
    if not (name.startswith("_foreach") or name.startswith("_fused")):
        return _KERNELS.get(name, 1)
    lists = [list(tensors_in(arg)) for arg in args if isinstance(arg, list | tuple)]
    if name == "_foreach_copy_" and any(
        here.stride() != there.stride() for here, there in zip(*lists[:2], strict=True)
    ):
        return len(lists[0])  # one after the other
    chunks = sum(-(-tensor.numel() // LIST_CHUNK) for tensor in lists[0])
    return max(-(-len(lists[0]) // LIST_TENSORS), -(-chunks // LIST_BLOCKS))


def _bytes(name: str, args: Sequence[Any], kwargs: Any, out: Any) -> float:
    """Read and written, a tensor that is both twice."""
    written = list(tensors_in(out))
    replaced = {id(tensor) for tensor in tensors_in(kwargs.get("out"))}
    if name in _OVERWRITES:
        replaced |= {id(tensor) for tensor in tensors_in(args[0])}
    read = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) not in replaced]
    return float(sum(map(_size, itertools.chain(read, written))))


def _size(tensor: Tensor) -> int:
    """In bytes; what is expanded lies in memory once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size()


def _attention_bytes(name: str, args: Sequence[Any]) -> int:
    """What flash attention allocates inside, besides its results: in the backward an fp32 sum for
    each query, whose head is rounded up, and a number for each.
    """
    if name == "_flash_attention_forward":
        return 0
    query = args[1]
    tokens, heads, width = query.shape
    rounded = -(-width // 32) * 32
    return 4 * tokens * heads * (rounded + 1)


def _place() -> str:
    """The line of the package that asked for it."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.name}"
    return "elsewhere"


def all_of(counters: Iterable[Counter[str]]) -> Counter[str]:
    """Their sum."""
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total
