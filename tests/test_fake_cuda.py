"""The GPU that is not there refuses what a GPU would: every fault that we look for is planted once, and found."""

from __future__ import annotations

import ast
import inspect
from functools import reduce
from pathlib import Path

import pytest
import torch

import fake_cuda
from fake_cuda import CannotCapture, FakeGpu, GpuTensor, gpu

ROOT = Path(__file__).parent.parent
WAITS = {
    "item": lambda x: x.sum().item(), "bool": lambda x: bool(x.any()), "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(), "nonzero": lambda x: x.nonzero(), "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x), "synchronize": lambda x: torch.cuda.synchronize(), "unique": lambda x: x.unique(),
}  # fmt: skip
COPIES = {
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device), "to": lambda x: torch.ones(2).to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(2)), "list index": lambda x: x[[0, 1]], "CPU index": lambda x: x[torch.tensor([0])],
    "CPU scalar": lambda x: x + torch.tensor(1.0), "seed": lambda x: torch.as_tensor([3.0, 4.0], device="cuda"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*WAITS, *COPIES])
def test_a_capture_holds_no_wait_and_no_copy_from_the_host(fault):
    work = (WAITS | COPIES)[fault]
    with gpu():
        x = torch.ones(2, device="cuda")
        work(x)  # outside a capture all of it is allowed
        with pytest.raises(CannotCapture), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work(x)


def test_what_a_round_is_made_of_can_be_captured():
    with gpu() as fake, torch.inference_mode():
        x = torch.ones(2, 3, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            y = torch.arange(3, device=x.device) + torch.zeros_like(x) + torch.full((), 2, device=x.device)
            x[:, 1] = 4
            x[0] = torch.where(y[1] > 2, y[0], 0)
            x.index_copy_(0, torch.zeros(1, dtype=torch.int64, device=x.device), y[:1])
        assert set(fake.waits) == {"synchronize"}, "before the capture"


def test_a_replay_does_the_operations_again_on_the_memory_they_had():
    with gpu():
        total, step = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            twice = step * 2
            total += twice.view(3)
        step[0] = 5
        for _ in range(2):
            graph.replay()
        assert twice.tolist() == [10, 2, 2]
        assert total.tolist() == [2 + 10 + 10, 6, 6], "once when it was captured, which a GPU leaves out, and twice again"
        with pytest.raises(RuntimeError, match="preceding successful capture"):
            torch.cuda.CUDAGraph().replay()


def test_tensors_of_two_devices_do_not_meet():
    with gpu():
        x = torch.ones(2, 2, device="cuda")
        there = torch.ones(2, 2)
        for work in (lambda: x @ there, lambda: torch.cat([x, there]), lambda: torch.where(x > 0, x, there)):
            with pytest.raises(RuntimeError, match="same device"):
                work()
        assert (x + 1).device == torch.device("cuda", 0)
        assert isinstance(torch.zeros_like(x), GpuTensor)
        assert isinstance(x.new_empty(3), GpuTensor)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


def test_an_asynchronous_copy_is_nonsense_until_its_event_was_waited_for():
    with gpu():
        there, here = torch.arange(3, device="cuda"), torch.empty(3, dtype=torch.int64, pin_memory=True)
        done = torch.cuda.Event()
        here.copy_(there, non_blocking=True)
        done.record(torch.cuda.current_stream())
        there.zero_()
        assert here.tolist() != [0, 1, 2]
        done.synchronize()
        assert here.tolist() == [0, 1, 2], "as it was when the copy was sent"


def test_an_event_has_a_time_only_where_it_was_made_for_one_and_waited_for():
    with gpu():
        start, end, plain = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
        for event in (start, end, plain):
            event.record()
        with pytest.raises(RuntimeError, match="synchronize first"):
            start.elapsed_time(end)
        torch.cuda.synchronize()
        assert start.elapsed_time(end) > 0
        with pytest.raises(RuntimeError, match="enable_timing"):
            start.elapsed_time(plain)


@pytest.mark.parametrize("name", fake_cuda.REPLACED)
def test_the_fake_has_the_arguments_of_torch(name):
    """So that a call that torch would not take is not taken here."""
    real, fake = getattr(torch.cuda, name), getattr(FakeGpu(), name)
    wanted = inspect.signature(real.__new__ if name in ("Event", "Stream", "CUDAGraph") else real).parameters
    given = inspect.signature(fake).parameters
    known = set(wanted) - {"cls", "args", "kwargs"}
    assert set(given) - {"kwargs"} <= known, f"torch.cuda.{name} takes {sorted(known)}"


def test_everything_that_we_ask_of_torch_cuda_exists():
    asked = set()
    for folder in ("specdec_lab", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                words = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
                if words.startswith("torch.cuda.") and words.replace(".", "").isidentifier():
                    asked.add(words)
    assert {"torch.cuda.CUDAGraph", "torch.cuda.mem_get_info"} <= asked
    for words in sorted(asked):
        reduce(getattr, words.split(".")[1:], torch)
