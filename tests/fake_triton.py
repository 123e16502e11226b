"""Triton over the GPU that is not there: every launch goes through Triton's own binder, and is refused as a real one would be.

Binding, specialisation (16-byte alignment, integers that are 1 or do not fit 32 bits), options and constants are Triton's own
code, asked for an sm_90 target. Instead of compiling and running, a launch is checked and written down: what would have been
compiled is in `Launch.variant`, so a test can count variants or compile them ahead of time. Not known here: what kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from fake_cuda import FakeGpu, GpuTensor
from specdec_kernels.round_contract import INT32, POINTERS

SM = 90
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
INTEGERS = (torch.int32, torch.int64)
KINDS = {"*i64": (torch.int64,), "*fp32": (torch.float32,), "*fp64": (torch.float64,), "*i1": (torch.bool,)}
# what kernels load and use as numbers of any width, beside those that every kernel means the same by
NUMBERS = {*INT32, "tokens", "refused", "best", "node_depth", "query_node", "number"}
EXACT = {**{n: KINDS[t] for n, t in POINTERS.items() if n not in NUMBERS}, "words": (torch.int32,), "window": (torch.int32,),
         "stamps": (torch.int64,), "table": (torch.int64,), "work": (torch.int32,), "work_count": (torch.int32,),
         "part_out": (torch.float32,), "part_lse": (torch.float32,)}  # fmt: skip


class RefusedLaunch(ValueError):
    """What a launch on a GPU would have failed on, or read wrongly."""


@dataclass(frozen=True)
class Pointer:
    """A tensor as Triton's binder sees one."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Variant:
    """One kernel as Triton would compile it; equal variants are compiled once."""

    name: str
    key: str
    kernel: Any
    signature: Any
    constants: Any
    attributes: Any
    options: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Variant) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def compile(self) -> Any:
        """Ahead of time, as the launch would have done it; seconds."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", SM, 32), options=dict(self.options.__dict__))


@dataclass(frozen=True)
class Launch:
    """One launch. in_capture: a variant that is met there for the first time would be compiled in the middle of a capture."""

    variant: Variant
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    is_new: bool
    in_capture: bool


class Driver:
    """What JITFunction.run asks of a driver."""

    def __init__(self, sm: int = SM) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.device = GPUTarget("cuda", sm, 32), object()  # an object: nothing is kept for a real device

    def get_current_device(self) -> Any:
        return self.device

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def fake_triton(gpu: FakeGpu) -> Iterator[list[Launch]]:
    """Launches, until the block ends; also in `gpu.launched`."""
    from triton.runtime import JITFunction
    from triton.runtime.driver import driver

    real_run, compiled = JITFunction.run, set[Variant]()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        for name, value in zip(kernel.arg_names, args, strict=False):
            _check_argument(kernel, name, value)
        with gpu.bare():
            pointers = [_pointer(a) for a in args]
            made = real_run(kernel, *pointers, grid=grid, warmup=True, **{k: _pointer(v) for k, v in options.items()})
        _check_grid(kernel, grid)
        is_new = made not in compiled
        compiled.add(made)
        if is_new and gpu.capturing is not None:
            raise RefusedLaunch(f"{kernel.__name__} would be compiled in the middle of a capture")
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        gpu.launched.append(Launch(made, tuple(grid), given, is_new, gpu.capturing is not None))
        return made

    def compile_nothing(kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any,
                        warmup: bool) -> Variant:  # fmt: skip
        kernel.cache_key  # what Triton computes first: it looks at everything that the kernel refers to  # noqa: B018
        kernel_cache = kernel.device_caches[device][0]
        made = Variant(kernel.__name__, key, kernel, signature, constants, attributes, options)
        kernel_cache[key] = made
        return made

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", Driver()))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compile_nothing))
        yield gpu.launched


def _pointer(value: Any) -> Any:
    return Pointer(value.dtype, value.here.data_ptr()) if isinstance(value, GpuTensor) else value


def _check_argument(kernel: Any, name: str, value: Any) -> None:
    """A pointer into the GPU of a type that the kernel reads rightly, or a plain number."""
    what = f"{kernel.__name__}({name})"
    if isinstance(value, torch.Tensor):
        if not isinstance(value, GpuTensor):
            raise RefusedLaunch(f"{what}: pointer argument cannot be accessed from Triton (cpu tensor?)")
        if name in EXACT and value.dtype not in EXACT[name]:
            raise RefusedLaunch(f"{what} is read as {EXACT[name]}, got {value.dtype}")
        if name in NUMBERS and value.dtype not in INTEGERS:
            raise RefusedLaunch(f"{what} is read as an integer, got {value.dtype}")
    elif value is not None and type(value) not in (int, float):
        raise RefusedLaunch(f"{what} is neither a tensor nor a plain number: {value!r}")


def _check_grid(kernel: Any, grid: Any) -> None:
    sizes = tuple(grid)
    fits = 1 <= len(sizes) <= 3 and all(type(n) is int and 0 < n <= most for n, most in zip(sizes, MOST_PROGRAMS, strict=False))
    if not fits:
        raise RefusedLaunch(f"{kernel.__name__}: a grid of {sizes}")


