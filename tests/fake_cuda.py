"""A GPU that is not there: tensors that say they lie on it, and a torch.cuda that refuses what a real one would.

The numbers of a `GpuTensor` lie in a CPU tensor behind it, so whole engines run, read results and can be compared. What fails
on a first contact with a GPU fails here: tensors of two devices in one operation; inside a capture any wait for the device and
any copy from or to pageable memory; a host that reads an asynchronous copy too early; a launch that Triton would refuse
(fake_triton.py). A captured graph is the list of its operations on the memory they had, and a replay does them again.

Not known here: kernels' arguments, and anything about time. `with gpu() as fake:` puts it in place; what it saw is in `fake`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
COPIES = {"copy_", "to", "cpu", "cuda", "type_as"}
WAITS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "bincount", "nonzero_numpy"}
FREE_BYTES = 40 << 30
aten = torch.ops.aten


class CannotCapture(RuntimeError):
    """What CUDA says to an operation that it cannot hold in a graph."""


class GpuTensor(torch.Tensor):
    """A tensor on the GPU that is not there; its numbers are in `here`."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> GpuTensor:
        with torch.inference_mode(False):  # the numbers behind it know in which mode they were made
            made = torch.Tensor._make_wrapper_subclass(
                cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype
            )
        made.here = here
        return made

    @property
    def device(self) -> torch.device:  # of Python's view alone: a torch without CUDA refuses tensors that really say so
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"GpuTensor({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().operate(func, args, kwargs or {})


@dataclass
class Event:
    """As torch.cuda.Event; copies that were under way when it was recorded arrive when it is waited for."""

    cuda: ClassVar[FakeGpu]
    enable_timing: bool = False
    blocking: bool = False
    interprocess: bool = False
    external: bool = False
    recorded: int | None = field(default=None, init=False)
    in_capture: bool = field(default=False, init=False)

    def record(self, stream: Stream | None = None) -> None:
        assert stream is None or isinstance(stream, Stream)
        self.recorded, self.in_capture = next(self.cuda.moments), self.cuda.is_capturing

    def synchronize(self) -> None:
        self.cuda.wait("Event.synchronize", self.recorded)

    def query(self) -> bool:
        self.cuda.wait("Event.query")
        return True

    def elapsed_time(self, end: Event) -> float:
        for event in (self, end):
            if not event.enable_timing or event.recorded is None:
                raise RuntimeError("Both events must be recorded, with enable_timing, before their time is asked for")
            if event.in_capture:
                raise RuntimeError("an event that was recorded in a capture has no time (external=True would)")
            if event.recorded > self.cuda.waited_until:
                raise RuntimeError("the device has not reached this event yet: synchronize first")
        return (end.recorded - self.recorded) * 1e-2  # type: ignore[operator]


@dataclass(eq=False)
class Stream:
    """As torch.cuda.Stream; everything here runs at once, in the order of the host's calls."""

    cuda: ClassVar[FakeGpu]
    device: Any = None
    priority: int = 0

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        self.cuda.wait("Stream.synchronize")


@dataclass(eq=False)
class Graph:
    """As torch.cuda.CUDAGraph."""

    cuda: ClassVar[FakeGpu]
    keep_graph: bool = False
    steps: list[Callable[[], None]] = field(default_factory=list, init=False)
    pool: Any = field(default=None, init=False)
    stream: Stream | None = field(default=None, init=False)
    is_captured: bool = field(default=False, init=False)
    replays: int = field(default=0, init=False)

    def replay(self) -> None:
        if not self.is_captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.replays += 1
        with self.cuda.bare():
            for step in self.steps:
                step()


class FakeGpu:
    """The state of the GPU, and everything that we ask of torch.cuda.

    launched  what Triton was asked to launch (fake_triton.Launch), in order
    waits     how often the host waited for the device, by reason
    """

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.capturing: Graph | None = None
        self.copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # asynchronous ones under way: from, to, by moment
        self.moments, self.waited_until = itertools.count(1), 0
        self.pinned: dict[int, torch.Tensor] = {}
        self.launched: list[Any] = []
        self.waits: Counter[str] = Counter()
        self.Event, self.Stream, self.CUDAGraph = (type(c.__name__, (c,), {"cuda": self}) for c in (Event, Stream, Graph))
        self.device = Device
        self._stream = self.Stream()
        self._places: TorchFunctionMode | None = None

    # --- what happens to tensors

    @property
    def is_capturing(self) -> bool:
        return self.capturing is not None

    def wait(self, reason: str, until: int | None = None) -> None:
        """The host waits for the device, up to a moment or for all; it may not while a graph is captured."""
        if self.capturing is not None:
            raise CannotCapture(f"operation not permitted when stream is capturing: {reason}")
        self.waits[reason] += 1
        self.waited_until = max(self.waited_until, next(self.moments) if until is None else until)
        for moment in [m for m in self.copies if m < self.waited_until]:
            source, target = self.copies.pop(moment)
            with self.bare():
                target.copy_(source)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation of torch with a tensor of ours among its arguments."""
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            return self._copied(func, name, args, kwargs)
        if name in WAITS or name.startswith("_unique"):
            self.wait(f"aten.{name}")
        if name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        ):
            self.wait(f"aten.{name} by a boolean mask")
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do it on the numbers behind our tensors, and remember how, if a graph is captured."""
        with self.bare():
            bare_args, bare_kwargs = tree_map(_bare, args), tree_map(_bare, kwargs)
            out = func(*bare_args, **bare_kwargs)
        if self.capturing is not None:
            self.capturing.steps.append(_again(func, bare_args, bare_kwargs, out))
        known = {id(t.here): t for t in tree_flatten((args, kwargs))[0] if isinstance(t, GpuTensor)}

        def wrapped(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return known.get(id(value)) if id(value) in known else GpuTensor(value)

        return tree_map(wrapped, out)

    def check_places(self, name: str, args: Any, kwargs: Any) -> None:
        """Everything on one device; torch lets numbers of no dimension, and indices, come from the host."""
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        strange = [t for t in tensors if not isinstance(t, GpuTensor)]
        if not strange or len(strange) == len(tensors) or name in COPIES:
            return
        shapes = [list(t.shape) for t in strange]
        if self.capturing is not None:
            raise CannotCapture(f"{name} takes CPU tensors {shapes} into a capture")
        if any(t.dim() for t in strange) and name not in ("__getitem__", "__setitem__", "index_put_", "index_put"):
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} with cuda:0 and cpu {shapes}")

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Copies within the GPU, to it and from it."""
        if name == "copy_":
            target, source, *rest = args
            is_async = bool(rest[0] if rest else kwargs.get("non_blocking", False))
            if isinstance(target, GpuTensor) and isinstance(source, GpuTensor):
                return self.run(func, args, kwargs)
            if isinstance(target, GpuTensor):
                if source.dim() or source.device.type != "cpu":
                    self.to_device(source)
                return self.run(func, args, kwargs)
            return self._to_host(target, source.here, is_async)
        return self.run(func, args, kwargs)

    def to_device(self, source: torch.Tensor) -> None:
        """A copy from the host. It may come from pageable memory, but a graph cannot hold it."""
        if self.capturing is not None and not self.is_pinned(source):
            raise CannotCapture(f"a copy of pageable memory {list(source.shape)} to the GPU in a capture")

    def _to_host(self, target: torch.Tensor, numbers: torch.Tensor, is_async: bool) -> torch.Tensor:
        if not (is_async and self.is_pinned(target)):
            self.wait("a copy to the host")
            with self.bare():
                return target.copy_(numbers)
        if self.capturing is not None:
            raise CannotCapture("copies to the host in a capture are not met yet: a replay would have to send them")
        with self.bare():
            self.copies[next(self.moments)] = numbers.clone(), target
            return target.fill_(-(1 << 40))  # whoever reads it before it has arrived reads nonsense

    @contextmanager
    def bare(self) -> Iterator[None]:
        """No places of tensors are asked for inside."""
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            yield

    # --- what we ask of torch.cuda, with its signatures (test_fake_cuda compares them)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return 9, 0

    def get_device_name(self, device: Any = None) -> str:
        return "GPU that is not there"

    def get_device_properties(self, device: Any = None) -> Any:
        return SimpleNamespace(
            name=self.get_device_name(), major=9, minor=0, multi_processor_count=4, total_memory=80 << 30,
            L2_cache_size=50 << 20, uuid="00000000-0000-0000-0000-000000000000", memory_clock_rate=2619000,
            memory_bus_width=5120,
        )  # fmt: skip

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return FREE_BYTES, 80 << 30

    def memory_reserved(self, device: Any = None) -> int:
        return 0

    def memory_allocated(self, device: Any = None) -> int:
        return 0

    def empty_cache(self) -> None:
        if self.capturing is not None:
            raise CannotCapture("cudaFree in a capture")

    def synchronize(self, device: Any = None) -> None:
        self.wait("synchronize")

    def current_stream(self, device: Any = None) -> Stream:
        return self._stream

    def set_stream(self, stream: Stream) -> None:
        self._stream = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    def graph_pool_handle(self) -> object:
        return object()

    @contextmanager
    def graph(
        self, cuda_graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.synchronize()
        self.empty_cache()
        if self.capturing is not None:
            raise CannotCapture("a capture in a capture")
        cuda_graph.pool, cuda_graph.stream = pool, stream
        before, self._stream = self._stream, stream or self.Stream()
        self.capturing = cuda_graph
        self.graphs.append(cuda_graph)
        try:
            yield
        except BaseException:
            self.capturing = None  # as torch does, which leaves its stream current where a capture fails
            raise
        self._stream, self.capturing, cuda_graph.is_captured = before, None, True


class Device:
    """As torch.cuda.device: there is one."""

    def __init__(self, device: Any) -> None:
        assert torch.device(device).type == "cuda" or device == 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        pass


REPLACED = (*(n for n in vars(FakeGpu) if hasattr(torch.cuda, n) and not n.startswith("_")), "Event", "Stream", "CUDAGraph",
            "device")  # fmt: skip


def _bare(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: tree_map(_bare, getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value.here if isinstance(value, GpuTensor) else value


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> Callable[[], None]:
    """Do an operation once more, into the memory that its results had."""

    def step() -> None:
        made = func(*args, **kwargs)
        for old, new in zip(tree_flatten(out)[0], tree_flatten(made)[0], strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    return step


class Places(TorchFunctionMode):
    """Puts what is asked to be made on "cuda" there, before torch asks for a driver."""

    def __init__(self, cuda: FakeGpu) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = getattr(self, f"_{getattr(func, '__name__', '')}", None)
        if special is not None:
            return special(func, args, kwargs)
        return self._made(func, args, kwargs)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.cuda.check_places(getattr(func, "__name__", str(func)), args, kwargs)
        device = kwargs.get("device")
        if kwargs.pop("pin_memory", False):
            return self._pinned(func(*args, **kwargs))
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        if any(isinstance(a, GpuTensor) for a in args):
            return func(*args, **{k: v for k, v in kwargs.items() if k != "device"})
        if func is torch.empty:
            func = torch.zeros  # whatever kernels leave alone is the same in every run
        return self.cuda.run(func, args, {**kwargs, "device": "cpu"})

    def _pinned(self, made: torch.Tensor) -> torch.Tensor:
        self.cuda.pinned[made.untyped_storage().data_ptr()] = made
        return made

    def _tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        """torch.tensor: made on the host, then copied."""
        device = kwargs.pop("device", None)
        made = func(*args, **kwargs)
        return made if device is None or torch.device(device).type != "cuda" else self._sent(made)

    def _as_tensor(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = args[0]
        if isinstance(given, GpuTensor):
            dtype = kwargs.get("dtype")
            return given if dtype is None else given.to(dtype)
        return self._tensor(func, args, kwargs)

    def _sent(self, made: torch.Tensor) -> GpuTensor:
        self.cuda.to_device(made)
        return self.cuda.run(torch.clone, (made,), {})  # type: ignore[no-any-return]

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        device, dtype, _, _ = torch._C._nn._parse_to(*rest, **{k: v for k, v in kwargs.items() if k != "copy"})
        if device is None or (device.type == "cuda") == isinstance(tensor, GpuTensor):
            if device is None or dtype is None or isinstance(tensor, torch.Tensor) and not isinstance(tensor, GpuTensor):
                return func(tensor, dtype) if dtype is not None else tensor
            return func(tensor, dtype)
        if device.type == "cuda":
            return self._sent(tensor if dtype is None else tensor.to(dtype))
        return self._cpu(func, (tensor if dtype is None else tensor.to(dtype),), {})

    def _cpu(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(args[0], GpuTensor):
            return args[0]
        self.cuda.wait("a copy to the host")
        return args[0].here.clone()

    def _cuda(self, func: Any, args: Any, kwargs: Any) -> Any:
        return args[0] if isinstance(args[0], GpuTensor) else self._sent(args[0])

    def ___getitem__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A list is an index tensor of the host, which torch sends to the GPU."""
        tensor, index = args
        parts = index if isinstance(index, tuple) else (index,)
        if isinstance(tensor, GpuTensor) and any(isinstance(p, list) for p in parts):
            index = tuple(self._sent(torch.tensor(p)) if isinstance(p, list) else p for p in parts)
        return self._made(func, (tensor, index), kwargs)

    def ___setitem__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A number is filled in by a kernel, and is no tensor on the host as it is for a CPU."""
        tensor, index, value = args
        if not isinstance(tensor, GpuTensor) or isinstance(value, torch.Tensor):
            return self._made(func, args, kwargs)
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(p, torch.Tensor) for p in parts):
            value = self.cuda.run(torch.full, ((), value), {"dtype": tensor.dtype})
            return self._made(func, (tensor, index, value), kwargs)
        return tensor[index].fill_(value)

    def _tolist(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(self._cpu(func, args, kwargs))

    def _numpy(self, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(args[0], GpuTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return func(*args, **kwargs)

    def _data_ptr(self, func: Any, args: Any, kwargs: Any) -> Any:
        return _bare(args[0]).data_ptr()

    def _scaled_dot_product_attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        if not any(isinstance(t, GpuTensor) for t in given):
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype not in (torch.bool, given[0].dtype):
            raise RuntimeError(f"Expected attn_mask dtype to be bool or to match query dtype, got {mask.dtype}")
        self.cuda.check_places("scaled_dot_product_attention", args, kwargs)
        return self.cuda.run(func, args, kwargs)


_FAKES: list[FakeGpu] = []


def _current() -> FakeGpu:
    if not _FAKES:
        raise RuntimeError("this tensor lies on a GPU that is gone: use it inside `with gpu():`")
    return _FAKES[-1]


class Generator(torch.Generator):
    """Random numbers for any device, made on the CPU."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


@contextmanager
def gpu() -> Iterator[FakeGpu]:
    """A GPU, until the block ends."""
    fake = FakeGpu()
    with ExitStack() as stack:
        for name in REPLACED:
            stack.enter_context(mock.patch.object(torch.cuda, name, getattr(fake, name)))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        _FAKES.append(fake)
        stack.callback(_FAKES.pop)
        stack.enter_context(Places(fake))
        yield fake
