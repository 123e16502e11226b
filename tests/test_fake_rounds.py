"""Engines on the GPU that is not there: captured rounds, rounds on the host, prompts and the GPU script's stages run through.

Every launch goes through Triton's binder; what a capture forbids fails. A new configuration is tried by adding it to a list.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest
import torch

import specdec_lab as sd
import tiny
from fake_cuda import CannotCapture, gpu
from specdec_lab.bench import doctor
from specdec_lab.engine import attention, calibrate, cuda_ceilings, tree_layout
from specdec_lab.engine.device import kernel_deciding, ops
from specdec_lab.engine.device import round as device_round

pytest.importorskip("triton")
from fake_kernels import meant
from fake_triton import Launch, RefusedLaunch, fake_triton

GREEDY, COUPLED = {}, {"temperature": 0.8, "verifier": "coupled", "seed": 3}
REJECTION, CUT = {"temperature": 0.8, "seed": 5}, {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "seed": 7}
LAWS = {"greedy": GREEDY, "coupled": COUPLED, "rejection": REJECTION, "top-p": CUT}
CONFIGS = ["off", "self:4+8/chain3", "model:4+8/chain2", "model:full/chain1", "self:4+8/3,2,1", "model:3+9/tree:-1,0,-1,0,2"]
ON_HOST = ["ngram/chain3", "ngram/2,1", "self:snapkv8+16/chain2", "self:snapkv8+16r4/2,1"]
SIZES = {"num_hidden_layers": 1, "max_position_embeddings": 4096}


@contextmanager
def machine(*, computes=False):
    """A GPU with Triton; small calibrations. `computes`: kernels do what they mean, else what they leave is zero."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in (("SIDE", 16), ("READ_BYTES", 1 << 14), ("SMALLEST_READ_BYTES", 1 << 14), ("WARM_UP", 1)):
            patch.setattr(cuda_ceilings, name, value)
        for cache in (attention._chain, tree_layout.layout_of, calibrate.calibrate):
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        fake = stack.enter_context(gpu())
        stack.enter_context(fake_triton(fake))
        if computes:
            stack.enter_context(meant(fake))
        yield fake


def workload(tokens=9, lengths=(9, 30, 17), **more):
    return sd.Workload("test", tiny.prompts(list(lengths)), tokens, stop_at_eos=False, **more)


def tokens_of(run):
    return [step.tokens for step in run.rounds]


@pytest.fixture(scope="module")
def models():
    return tiny.model("qwen3", **SIZES), tiny.model("llama", seed=1, **SIZES)


@pytest.mark.parametrize(
    ("config", "law"),
    [("off", "greedy"), ("self:4+8/chain3", "rejection"), ("model:4+8/chain2", "coupled"), ("self:4+8/3,2,1", "rejection"),
     ("model:3+9/tree:-1,0,-1,0,2", "greedy")],
)  # fmt: skip
def test_captured_rounds_emit_the_tokens_of_rounds_on_the_host(models, config, law):
    asked = workload(**LAWS[law])
    right = tokens_of(sd.record(sd.Engine(sd.load(*models), "sdpa", rounds="host").steps(asked, config)))
    with machine(computes=True) as fake:
        engine = sd.Engine(sd.load(*models, device="cuda"))
        run = sd.record(engine.steps(asked, config))
        assert run.header.target["rounds"] == "one CUDA graph, triton operations"
        assert tokens_of(run) == right
        (graph,) = (g for g in fake.graphs if g.pool is not None)
        assert graph.replays >= len(run.rounds), "rounds were replays, and nothing else"


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("forced", [None, 0.7], ids=["decided", "forced"])
def test_every_program_can_be_captured(models, forced, law):
    with machine() as fake:
        engine = sd.Engine(sd.load(*models, device="cuda"), forced=forced)
        opened = engine.open(workload(4, **LAWS[law]))
        for config in CONFIGS:
            assert len(sd.record(opened.steps(config)).rounds) > 0
        graphs = [g for g in fake.graphs if g.pool is not None]
        assert len(graphs) == len(CONFIGS)
        assert len({id(g.pool) for g in graphs}) == len({id(g.stream) for g in graphs}) == 1, "or they share no memory"


@pytest.mark.parametrize("rounds", ["host", "eager"])
def test_rounds_that_are_not_captured_run_on_a_gpu(models, rounds):
    with machine(computes=rounds == "host") as fake:
        engine = sd.Engine(sd.load(*models, device="cuda"), rounds=rounds)
        opened, names = engine.open(workload(4, **REJECTION)), set()
        for config in [*CONFIGS, *ON_HOST]:
            assert len(sd.record(opened.steps(config)).rounds) > 0
        names = {launch.variant.name for launch in fake.launched}
        assert {"split_kernel", "nothing_kernel"} <= names
        assert ("list_kernel" in names) == (rounds == "eager")


def test_a_window_changes_without_another_graph_and_without_another_variant(models):
    with machine() as fake:
        opened = sd.Engine(sd.load(*models, device="cuda")).open(workload(4))
        sd.record(opened.steps("self:4+8/chain2"))
        before = len(fake.graphs), len(fake.launched)
        for config in ("self:1+16/chain2", "self:full/chain2"):
            sd.record(opened.steps(config))
        assert (len(fake.graphs), len(fake.launched)) == before, "no launch outside the graphs"


@pytest.mark.parametrize("config", ["off", "self:4+8/chain2", "self:4+300/2,1", "model:4+8/chain2", "self:snapkv8+16/chain2"])
@pytest.mark.parametrize("rounds", ["host", "device"])
def test_nothing_is_compiled_after_the_first_round_however_long_texts_grow(models, rounds, config):
    """A kernel compiled in mid-run would be measured as a slow round. The texts grow beyond a part of attention's keys."""
    with machine() as fake:
        engine, launched = sd.Engine(sd.load(*models, device="cuda"), rounds=rounds), fake.launched
        steps = iter(engine.open(workload(24, (1010, 3))).steps(config))
        next(steps)
        next(steps)
        first = len(launched)
        assert [launch.variant.name for launch in launched if launch.is_new]
        assert len(list(steps)) > 3
        assert [launch.variant.name for launch in launched[first:] if launch.is_new] == []


def test_doctor_on_a_gpu_says_how_rounds_run_and_reads_that_gpus_sensors(models, tmp_path, monkeypatch):
    asked, by_layer = [], "the triton back end attends layer by layer"
    monkeypatch.setattr(doctor.sensors._Gpu, "open", lambda nvml, gpu: asked.append(gpu) or doctor.sensors.Absent("no driver"))
    with machine():
        pair = sd.load(*models, device="cuda")
        for rounds, state, words in (
            ("auto", "ok", "one CUDA graph, triton operations"),
            ("host", "note", f"layer by layer: {by_layer}; not as graphs: rounds='host' was asked for"),
        ):
            found = {f.topic: f for f in doctor.examine(sd.Engine(pair, rounds=rounds), database=tmp_path).findings}
            assert (found["rounds"].state, found["rounds"].what) == (state, words)
            assert found["GPU"].advice.startswith("No power, clocks or energy")
            assert "GFLOP/s in bfloat16" in found["ceilings"].what
    assert set(asked) == {"00000000-0000-0000-0000-000000000000"}


def _wait(state, decision):
    if bool(state.live.any()):
        pass
    return WHOLE_CUT(state, decision)


def _cpu_index(state, decision):
    state.ids[torch.tensor([0])]
    return WHOLE_CUT(state, decision)


def _from_host(state, decision):
    state.ids.clamp_(max=torch.tensor([7], device=state.ids.device))
    return WHOLE_CUT(state, decision)


WHOLE_CUT = device_round._cut


@pytest.mark.parametrize("fault", [_wait, _cpu_index, _from_host])
def test_a_round_that_asks_the_host_is_found_when_it_is_captured(models, fault, monkeypatch):
    monkeypatch.setattr(device_round, "_cut", fault)
    with machine():
        engine = sd.Engine(sd.load(*models, device="cuda"))
        with pytest.raises(CannotCapture):
            sd.record(engine.steps(workload(4), "self:4+8/chain2"))


def _wide(kernel):
    return lambda tokens, counts, *more: kernel(tokens, counts.double(), *more)


def _elsewhere(kernel):
    return lambda tokens, counts, *more: kernel(tokens, counts.cpu(), *more)


@pytest.mark.parametrize(("fault", "error"), [(_wide, ValueError), (_elsewhere, RefusedLaunch)])
def test_a_wrong_argument_of_a_kernel_is_found(models, fault, error, monkeypatch):
    made = kernel_deciding.RoundKernels.of("gpu")
    wrong = {f: getattr(made, f) for f in made.__slots__} | {"accept_chain_equal": fault(made.accept_chain_equal)}
    monkeypatch.setattr(ops.RoundKernels, "of", lambda kind: kernel_deciding.RoundKernels(**wrong))
    with machine():
        engine = sd.Engine(sd.load(*models, device="cuda"), rounds="eager")
        with pytest.raises(error, match="counts"):
            sd.record(engine.steps(workload(4), "self:4+8/chain2"))


LAUNCH_FAULTS = {
    "a CPU tensor": (lambda k, x: k[(1,)](torch.zeros(2, dtype=torch.int64), x, 1, 1, 0), "cpu tensor"),
    "a wide number": (lambda k, x: k[(1,)](x, x.double(), 1, 1, 0), "read as an integer"),
    "a table of floats": (lambda k, x: k[(1,)](x.double(), x, 1, 1, 0), "read as"),
    "an enum": (lambda k, x: k[(1,)](x, x, 1, True, 0), "plain number"),
    "no programs": (lambda k, x: k[(0,)](x, x, 1, 1, 0), "a grid of"),
    "too many programs": (lambda k, x: k[(1, 65536)](x, x, 1, 1, 0), "a grid of"),
    "an unknown option": (lambda k, x: k[(1,)](x, x, 1, 1, 0, warps=4), "warps"),
    "a missing argument": (lambda k, x: k[(1,)](x, x, 1, 1), "column"),
}  # fmt: skip


@pytest.mark.parametrize("fault", LAUNCH_FAULTS)
def test_a_launch_that_triton_would_refuse_is_refused(fault):
    from specdec_kernels.stamp.gpu_kernels import stamp_kernel

    launch, words = LAUNCH_FAULTS[fault]
    with machine():
        x = torch.zeros(2, dtype=torch.int64, device="cuda")
        stamp_kernel[(1,)](x, x, 1, 1, 0, num_warps=1)
        with pytest.raises((RefusedLaunch, KeyError, TypeError), match=words):
            launch(stamp_kernel, x)


def test_a_variant_is_what_triton_would_compile():
    """Alignment, numbers that are 1 and numbers beyond 32 bits make variants, except where a kernel names them."""
    from specdec_kernels.row_lse.gpu_kernels import stats_kernel

    def stats(logits, row):
        stats_kernel[(1,)](logits, 1.0, out, out, where, row, V=8, BLOCK=32, num_warps=1)
        launch: Launch = fake.launched[-1]
        return launch.variant.signature["logits_row"], launch.is_new

    with machine() as fake:
        logits, out = torch.zeros(64, device="cuda"), torch.zeros(4, device="cuda")
        where = torch.zeros(4, dtype=torch.int32, device="cuda")
        assert stats(logits, 48) == ("i32", True)
        assert stats(logits, 64) == ("i32", False)
        assert stats(logits[1:], 64) == ("i32", True), "not 16-byte aligned"
        assert stats(logits, 1 << 33) == ("i64", True)
        assert stats(logits, 1) == ("constexpr", True)
        with pytest.raises(RefusedLaunch, match="in the middle of a capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            stats(logits, 5)
