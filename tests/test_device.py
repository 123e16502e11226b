"""Rounds on the device: the tokens of a session on the host, no host decision, one read per flight, graphs and their keys."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import specdec_lab as sd
import tiny
from device_world import FakeCuda
from specdec_kernels.accept.reference import Accepted
from specdec_kernels.row_lse.reference import RowStats
from specdec_kernels.sample_rows.reference import Drawn
from specdec_lab.engine import attention, tree_layout
from specdec_lab.engine.cache import CacheTooLarge
from specdec_lab.engine.clocks import Phase, PhaseClock
from specdec_lab.engine.device import flights, graphs, readings
from specdec_lab.engine.device import session as device_session
from specdec_lab.engine.device.deciding import TorchDeciding
from specdec_lab.engine.device.forward import Net
from specdec_lab.engine.device.kernel_deciding import KernelDeciding, RoundKernels
from specdec_lab.engine.device.ops import ReferenceOps, TritonOps
from specdec_lab.engine.device.plan import check_memory, list_bytes, plan
from specdec_lab.engine.device.program import Program
from specdec_lab.engine.device.readings import SyncedNow
from specdec_lab.engine.device.round import Stage, play
from specdec_lab.engine.device.state import ATTENTION, MOST_MARKS, TIMES, DeviceState
from specdec_lab.engine.sampling import Noise, Processor
from specdec_lab.records import SpecConfig, UnsupportedConfig

GREEDY, COUPLED = {}, {"temperature": 0.8, "verifier": "coupled", "seed": 3}
REJECTION, CUT = {"temperature": 0.8, "seed": 5}, {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "seed": 7}
LAWS = {"greedy": GREEDY, "coupled": COUPLED, "rejection": REJECTION, "top-p": CUT}
CONFIGS = [
    "off", "self:4+8/chain3", "model:4+8/chain2", "model:full/chain1", "self:4+8/3,2,1", "model:3+9/tree:-1,0,-1,0,2"
]
DRAFTING = {"draft_kv_read_bytes", "kv_write_bytes", "linear_flops", "attention_flops"}
TIMED = {f.name for f in dataclasses.fields(sd.StepRecord) if f.name.endswith("_s")}
TIMED |= {"flags", "draft_threads", "verify_threads"}


@pytest.fixture(scope="module")
def pair():
    return sd.load(tiny.model("llama"), tiny.model("llama", seed=1))


@pytest.fixture(scope="module")
def host(pair):
    return sd.Engine(pair, "sdpa", rounds="host")


@pytest.fixture(scope="module")
def device(pair):
    return sd.Engine(pair, "sdpa", rounds="device")


def workload(lengths=(9, 30, 17), tokens=20, **more):
    return sd.Workload("test", tiny.prompts(list(lengths)), tokens, **more)


def untimed(run):
    """Everything in a run's records that is not a measured time; of a second network's rounds also not what drafting cost.

    On the device its first forward always has two tokens.
    """
    names = {f.name for f in dataclasses.fields(sd.StepRecord)} - TIMED
    if any(step.config.startswith("model") for step in run.steps):
        names -= DRAFTING
    return [{name: getattr(step, name) for name in sorted(names)} for step in run.steps]


def by_kernel_references(monkeypatch):
    """Let sessions decide through the code that calls kernels, over the kernels' references."""

    def deciding(batch, ops):
        seed = torch.tensor([batch.noise.seed])
        return KernelDeciding(batch.processor, batch.verifier, batch.noise, seed, RoundKernels.of("reference"))

    monkeypatch.setattr(device_session, "_deciding", deciding)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_rounds_on_the_device_give_the_records_of_rounds_on_the_host(host, device, config, law):
    asked = workload(**LAWS[law])
    there, here = sd.record(device.steps(asked, config)), sd.record(host.steps(asked, config))
    assert untimed(there) == untimed(here)
    assert there.header.target["rounds"] == "eager, reference operations: no CUDA"
    assert sum(map(len, there.tokens())) > 3


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_deciding_by_kernels_gives_the_same_records(host, device, config, law, monkeypatch):
    by_kernel_references(monkeypatch)
    asked = workload((9, 21), 14, **LAWS[law])
    assert untimed(sd.record(device.steps(asked, config))) == untimed(sd.record(host.steps(asked, config)))


@pytest.mark.parametrize("lengths", [(1,), (1, 40), (7, 8, 9, 10), (300, 2, 64, 65, 33)], ids=str)
@pytest.mark.parametrize("config", ["off", "self:2+5/chain4", "model:4+8/chain3", "model:4+8/2,2"])
def test_any_batch_of_any_lengths_runs(host, device, lengths, config):
    asked = workload(lengths, 9, stop_at_eos=False)
    assert untimed(sd.record(device.steps(asked, config))) == untimed(sd.record(host.steps(asked, config)))


@pytest.mark.parametrize("config", ["off", "self:4+8/chain3", "model:full/3,1"])
def test_rows_that_end_at_different_rounds_emit_nothing_more(pair, config):
    plain = sd.record(sd.Engine(pair, "sdpa").steps(workload((9, 30, 17, 5), 40, stop_at_eos=False), "off")).tokens()
    ends = dataclasses.replace(pair, eos_ids=tuple(row[at] for row, at in zip(plain, (3, 9, 14, 22), strict=True)))
    here, there = (sd.record(sd.Engine(ends, "sdpa", rounds=r).steps(workload((9, 30, 17, 5), 40), config))
                   for r in ("host", "device"))  # fmt: skip
    assert untimed(there) == untimed(here)
    assert len({len(row) for row in there.tokens()}) > 2, "rows ended at different lengths"
    assert max(map(len, there.tokens())) < 40, "by their text, not by the limit"
    last = there.steps[-1]
    assert ("idle-rounds" in last.flags) == (last.host_s > 0 and "idle-rounds" in last.flags)
    assert last.wall_s == pytest.approx(sum(getattr(last, part) for part in sd.records.PHASES))


def test_turns_rewinds_and_switches_between_drafters_keep_the_tokens_of_plain_decoding(host, device):
    turns = tuple(tuple(map(tuple, tiny.prompts([n, 4, 6], seed=n))) for n in (3, 5))
    asked = workload((9, 30, 17), 12, turns=turns, stop_at_eos=False)
    plain = sd.record(host.steps(asked, "off")).tokens()
    order = ["self:4+8/chain3", "off", "model:4+8/chain2", "ngram/chain3", "model:4+8/2,1", "self:2+6/chain3"]
    asks = 0

    def choose(live, length):
        nonlocal asks
        asks += 1
        return order[asks // 2 % len(order)]

    opened = device.open(asked)
    first, second = sd.record(opened.steps(choose)), sd.record(opened.steps(choose))
    third = sd.record(opened.steps("self:4+8/chain3"))
    assert first.tokens() == second.tokens() == third.tokens() == plain
    assert len({step.config for step in first.rounds}) > 4, "every record says what it ran"


def test_a_stream_that_is_closed_midway_leaves_a_session_that_can_be_rewound(host, device):
    opened = device.open(workload((9, 14), 30, stop_at_eos=False))
    steps = iter(opened.steps("self:4+8/chain2"))
    for _ in range(4):
        next(steps)
    steps.close()
    plain = sd.record(host.steps(workload((9, 14), 30, stop_at_eos=False), "off")).tokens()
    assert sd.record(opened.steps("model:4+8/chain2")).tokens() == plain


@pytest.mark.parametrize("config", ["self:4+8/chain3", "model:4+8/chain2", "self:4+8/3,2", "model:4+8/2,2"])
def test_the_cache_is_that_of_plain_decoding(host, device, config):
    asked = workload((9, 30, 17), 20, stop_at_eos=False)
    plain, spec = host.open(asked), device.open(asked)
    for opened, what in ((plain, "off"), (spec, config)):
        sd.record(opened.steps(what))
    for row, length in enumerate(plain._session._batch.host_lengths):
        a, b = (opened._session._cache.kv[:, :, row, :, : length - 1] for opened in (plain, spec))
        assert torch.allclose(a, b, atol=2e-5)


class Asked(TorchDispatchMode):
    """Counts operations that make a host wait for a device, and copies out of the log."""

    WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique"}

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in self.WAITS or name.startswith("_unique"):
            self.found[name] += 1
        if name in ("index", "index_put") and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self.found["boolean index"] += 1
        return func(*args, **(kwargs or {}))


def stage_of(pair, law, kv=None, place=lambda x: x, ops=None):
    """A stage for rounds of three rows, its tensors put where `place` says."""
    state = place(DeviceState.of(torch.ones(3, 256, dtype=torch.int64), [0, 5], 1000, 8, 2))
    noise = Noise(3, place(torch.arange(3)))
    processor = Processor(law.get("temperature", 0.0), law.get("top_p", 1.0), law.get("top_k", 0))
    nets = [Net(place(r.parts()), r.shape, place(r.new_cache(3, 100).kv)) for r in (pair.target, pair.draft)]
    return Stage(state, *nets, ops or ReferenceOps(), TorchDeciding(processor, law.get("verifier", "rejection"), noise))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_round_asks_the_host_nothing(pair, config, law):
    stage, program = stage_of(pair, LAWS[law]), Program.of(SpecConfig.parse(config), torch.device("cpu"))
    stage.state.live.fill_(True)
    with torch.inference_mode(), Asked() as asked:
        for _ in range(3):
            play(stage, program)
    assert not asked.found
    assert int(stage.state.committed.min()) >= 3, "the rounds advanced every row"
    with Asked() as asked:
        int(stage.state.committed.min())
        stage.state.ids[stage.state.ids > 0]
    assert asked.found["_local_scalar_dense"], "the count can count"
    assert asked.found["boolean index"]


def to_meta(value):
    """The same, of tensors that have no values: whatever needs one, or mixes them with tensors elsewhere, fails."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, list):
        return [to_meta(v) for v in value]
    if dataclasses.is_dataclass(value):
        return type(value)(**{f.name: to_meta(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


class Timeless(ReferenceOps):
    """Stamps are the only thing that a host writes, and only where it does the work."""

    def plan(self, feed, base, kv, heads, window, stamps, lists=None):
        return super().plan(feed, base, kv, heads, window, None, lists)

    def stamp(self, table, number, column):
        pass


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_round_needs_no_value_and_mixes_no_devices(pair, config, law):
    attention._chain.cache_clear()
    tree_layout.layout_of.cache_clear()
    with torch.inference_mode():
        stage = stage_of(pair, LAWS[law], place=to_meta, ops=Timeless())
        phases = play(stage, Program.of(SpecConfig.parse(config), torch.device("meta")))
    assert phases[-1] is Phase.HOST
    assert phases.count(Phase.DRAFT_LINEAR) == SpecConfig.parse(config).depth


def no_kernels():
    """Kernels that return memory of the right shapes and look at nothing."""

    def drawn(logits, lse, temperature, seed, sequences, positions, *_args, **_more):
        return Drawn.empty(*positions.shape, device=positions.device)

    def chain(tokens, *_args):
        return Accepted.empty(*tokens.shape, 1, tokens.device)

    return RoundKernels(
        rope_append=lambda qkv, positions, slots, cos, sin, kv, *_: qkv.new_empty(
            *positions.shape, qkv.shape[2] // kv.shape[4] - 2 * kv.shape[2], kv.shape[4]),
        kv_compact=lambda kv, path, counts, committed: kv,
        row_lse=lambda logits, temperature, ids=None: RowStats.empty(
            logits.shape[0], 0 if ids is None else ids.shape[1], logits.device),
        accept_chain_equal=chain, accept_chain=chain, draw_gumbel=drawn, draw_inverse=drawn,
        accept_tree_equal=lambda tokens, exists, children, chosen, depth: Accepted.empty(
            tokens.shape[0], depth, children.shape[1], tokens.device),
        accept_tree=lambda tokens, children, *more: Accepted.empty(
            tokens.shape[0], more[-1], children.shape[1], tokens.device),
        draw_residual=lambda target, *_: Drawn.empty(target.shape[0], device=target.device),
        ngram_match=lambda ids, lengths, sizes, depth, work: (ids.new_empty(ids.shape[0], depth), ids.new_empty(ids.shape[0])),
    )  # fmt: skip


class NoKernels(TritonOps):
    def plan(self, feed, base, kv, heads, window, stamps, lists=None):
        assert lists is None or lists.device.type == "meta"
        assert {feed.words.device, base.device, kv.device} == {torch.device("meta")}
        assert window is None or window.device.type == "meta"
        return feed

    def attend(self, q, kv, layer, plan, scale):
        assert q.shape[1] == plan.num_queries
        return torch.empty_like(q)

    def stamp(self, table, number, column):
        pass


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_round_of_kernels_needs_no_value_between_them_and_mixes_no_devices(pair, config, law):
    attention._chain.cache_clear()
    tree_layout.layout_of.cache_clear()
    with torch.inference_mode():
        stage = stage_of(pair, LAWS[law], place=to_meta, ops=NoKernels(no_kernels()))
        chosen = stage.deciding
        stage.deciding = KernelDeciding(
            chosen.processor, chosen.verifier, chosen.noise, to_meta(torch.zeros(1, dtype=torch.int64)), stage.ops.kernels
        )
        play(stage, Program.of(SpecConfig.parse(config), torch.device("meta")))


def test_results_are_read_once_per_flight(device, monkeypatch):
    opened_letters, sent = [], []
    original = readings.HostPost.send

    def send(self, log):
        letter = original(self, log)
        sent.append(letter)
        return SimpleNamespace(open=lambda: opened_letters.append(1) or letter.open())

    monkeypatch.setattr(readings.HostPost, "send", send)
    run = sd.record(device.steps(workload((9, 20), 64, stop_at_eos=False), "off"))
    assert len(run.rounds) == 64
    assert len(sent) == len(opened_letters) == 64 // flights.ROUNDS_PER_READ


def test_without_an_end_token_no_round_is_played_in_vain(device, monkeypatch):
    played = []
    original = graphs.Eager.play
    monkeypatch.setattr(graphs.Eager, "play", lambda self: played.append(1) or original(self))
    for config in ("off", "self:4+8/chain3", "model:4+8/2,2"):
        played.clear()
        run = sd.record(device.steps(workload((9, 20), 37, stop_at_eos=False), config))
        assert len(played) == len(run.rounds)


def test_buffers_stay_where_they_are(device):
    opened = device.open(workload((9, 20), 40, stop_at_eos=False))
    state = opened._session._state
    before = {f.name: getattr(state, f.name).data_ptr() for f in dataclasses.fields(state)}
    kv = opened._session._cache.kv.data_ptr()
    for config in ("self:4+8/chain3", "model:4+8/2,2", "off"):
        sd.record(opened.steps(config))
    assert before == {f.name: getattr(state, f.name).data_ptr() for f in dataclasses.fields(state)}
    assert kv == opened._session._cache.kv.data_ptr()


@pytest.fixture
def captured(pair, monkeypatch):
    """An engine that captures, on a CUDA that is not there, and that CUDA."""
    cuda = FakeCuda()
    engine = sd.Engine(pair, "sdpa", rounds="device")
    engine.rounds = dataclasses.replace(engine.rounds, mode="captured")
    made = device_session.DeviceSession.__init__
    monkeypatch.setattr(
        device_session.DeviceSession, "__init__", lambda self, *args, **kwargs: made(self, *args, **kwargs, cuda=cuda)
    )
    original = graphs.play

    def noted(stage, program):
        """During a capture nothing runs: the work is kept for the replays, and the numbers stay as they are."""
        if cuda.capturing is None:
            cuda.rehearsals += 1
            return original(stage, program)
        cuda.capturing.again = lambda: original(stage, program)
        saved = [buffer.clone() for buffer in (*stage.state.counters(), stage.state.log)]
        phases = original(stage, program)
        for buffer, value in zip((*stage.state.counters(), stage.state.log), saved, strict=True):
            buffer.copy_(value)
        return phases

    monkeypatch.setattr(graphs, "play", noted)
    return engine, cuda


@pytest.mark.parametrize("law", ["greedy", "rejection"])
def test_rounds_are_replays_of_one_graph_whatever_window_or_length(captured, host, law):
    engine, cuda = captured
    asked = workload((9, 30, 17), 24, stop_at_eos=False, **LAWS[law])
    opened = engine.open(asked)
    for config in ("self:4+8/chain3", "self:2+20/chain3", "self:full/chain3"):
        run, expected = sd.record(opened.steps(config)), sd.record(host.steps(asked, config))
        assert [step.tokens for step in run.rounds] == [step.tokens for step in expected.rounds]
    assert len(cuda.graphs) == 1, "windows are values on the device"
    assert cuda.rehearsals == graphs.REHEARSALS
    replays = cuda.graphs[0].replays
    assert replays >= 3 * len(run.rounds) // 2
    assert sd.record(opened.steps("off")).tokens()
    sd.record(opened.steps("model:4+8/chain2"))
    assert len(cuda.graphs) == 3, "another drafter or shape is another graph"
    assert cuda.graphs[0].replays == replays
    assert len(set(map(id, cuda.pools))) == 1, "one memory pool"
    assert opened._session.capture_s > 0
    assert "CUDA graph" in run.header.target["rounds"]
    assert engine.identity().base["graphs"] is True


def test_lists_are_values_of_a_graph_and_only_their_budget_is_a_key(captured, host):
    engine, cuda = captured
    asked = workload((9, 40, 17), 24, stop_at_eos=False)
    opened = engine.open(asked)
    for config in ("self:snapkv8+4/chain3", "self:snapkv8+3r5/chain3", "self:snapkv8+9/chain3"):
        run, expected = sd.record(opened.steps(config)), sd.record(host.steps(asked, config))
        assert [step.tokens for step in run.rounds] == [step.tokens for step in expected.rounds]
    assert len(cuda.graphs) == 1
    others = (2, "self:snapkv7+4/chain3"), (3, "self:4+8/chain3"), (4, "ngram/chain3"), (4, "self:4+7/chain3")
    for graphs_made, config in others:
        run, expected = sd.record(opened.steps(config)), sd.record(host.steps(asked, config))
        assert [step.tokens for step in run.rounds] == [step.tokens for step in expected.rounds]
        assert len(cuda.graphs) == graphs_made, config


def test_parts_of_a_round_sum_to_its_wall_time_exactly(pair):
    ticks = iter(range(0, 10**9, 128))
    stage, program = stage_of(pair, GREEDY, ops=ReferenceOps(lambda: next(ticks))), Program.of(
        SpecConfig.parse("self:4+8/chain2"), torch.device("cpu")
    )  # fmt: skip
    stage.state.live.fill_(True)
    with torch.inference_mode():
        phases = [play(stage, program) for _ in range(3)][-1]
    assert phases == (*(Phase.DRAFT_LINEAR, Phase.DRAFT_OTHER) * 2, Phase.LINEAR, Phase.ACCEPT, Phase.COMMIT, Phase.HOST)
    found = readings.readings(stage.state.log, 0, 3)
    for before, reading in zip([None, *found], found, strict=False):
        assert reading.times[: len(phases)] == sorted(reading.times[: len(phases)])
        gap = 0 if before is None else readings.start_ns(reading) - readings.end_ns(before, phases)
        took, flags = readings.lap(phases, reading.times, gap)
        assert not flags
        assert took.wall_s * 1e9 == pytest.approx(gap + readings.end_ns(reading, phases) - readings.start_ns(reading))
        layers = 2  # each attends from one tick to the next
        assert took.seconds[Phase.ATTENTION] * 1e9 == pytest.approx(layers * 128)
        assert took.seconds[Phase.DRAFT_ATTENTION] * 1e9 == pytest.approx(2 * layers * 128)


def test_attention_that_does_not_lie_in_its_forward_is_flagged():
    times = [0] * TIMES
    times[:4] = [100, 300, 400, 500]
    times[ATTENTION] = 201
    assert ATTENTION > MOST_MARKS
    took, flags = readings.lap((Phase.LINEAR, Phase.ACCEPT, Phase.COMMIT, Phase.HOST), times, 50)
    assert flags == ("attention-above-forward",)
    assert took.wall_s * 1e9 == pytest.approx(450)


def test_without_instruments_only_whole_rounds_are_timed(pair):
    engine = sd.Engine(pair, "sdpa", rounds="device", instrument=False)
    run = sd.record(engine.steps(workload((9, 12), 12, stop_at_eos=False), "self:4+8/chain2"))
    assert all(step.wall_s == step.host_s > 0 for step in run.rounds)


def test_a_clock_waits_for_the_device_only_while_the_host_works_on_the_batch(pair):
    waited = []
    synced = SyncedNow(lambda: waited.append(1))
    engine = sd.Engine(pair, "sdpa", rounds="device", clock=PhaseClock(now=synced))
    made = device_session.DeviceSession.__init__

    class Told(device_session.DeviceSession):
        def __init__(self, *args, **kwargs):
            made(self, *args, **{**kwargs, "synced": synced})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdec_lab.engine.loop.DeviceSession", Told)
        steps = iter(engine.steps(workload((9, 12), 40, stop_at_eos=False), "off"))
    next(steps)
    assert waited, "the prompt was waited for"
    next(steps)
    before = len(waited)
    assert len(list(steps)) > 30
    assert len(waited) == before


def test_memory_is_planned_before_it_is_allocated_and_what_fits_is_named(pair):
    made = plan(pair, 8, 2000, 8)
    assert made.target_kv == pair.target.new_cache(8, 2000).kv.nbytes
    assert made.draft_kv == pair.draft.new_cache(8, 2000).kv.nbytes
    assert made.lists == 3 * list_bytes(pair.target, 8, 2048)
    assert made.total == sum(int(part.rsplit(" ", 1)[1].replace(",", "")) for part in str(made).split(", "))
    assert check_memory(pair, 8, 2000, 8, made.total) == made
    assert check_memory(pair, 8, 2000, 8, None) == made
    with pytest.raises(CacheTooLarge, match=r"8 sequences x 2000 tokens need .*target kv .* 5 sequences fit") as error:
        check_memory(pair, 8, 2000, 8, plan(pair, 5, 2000, 8).total)
    tokens = int(str(error.value).rsplit(" tokens", 1)[0].rsplit(" ", 1)[1])
    free = plan(pair, 5, 2000, 8).total
    assert plan(pair, 8, tokens, 8).total <= free < plan(pair, 8, tokens + 1, 8).total


def test_a_second_network_s_first_forward_is_counted_with_its_two_tokens(host, device):
    asked, shape = workload((9, 30), 10, stop_at_eos=False), device.pair.draft.shape
    there, here = (sd.record(e.steps(asked, "model:full/chain2")).rounds for e in (device, host))
    for mine, theirs in zip(there, here, strict=True):
        more = mine.linear_flops - theirs.linear_flops
        assert more in (0, shape.linear_flops(2)), "two rows, one token more each, unless the host had to catch up too"
    # the prefixes twice, beside them root and padding, then root and first draft
    assert there[0].draft_kv_read_bytes == shape.kv_bytes_per_token(4) * (2 * (8 + 29) + 2 * (2 + 2))


def test_who_cannot_run_on_the_device_is_told_why(pair, device):
    foreign = sd.load(tiny.model("olmo2"))
    with pytest.raises(ValueError, match="runs through transformers"):
        sd.Engine(foreign, rounds="device")
    with pytest.raises(ValueError, match="rounds must be one of"):
        sd.Engine(pair, rounds="gpu")
    assert sd.Engine(foreign).rounds.mode == sd.Engine(pair).rounds.mode == "host"
    opened = device.open(workload((9, 12), 12, stop_at_eos=False))
    opened._session._ops.max_queries = 8
    with pytest.raises(UnsupportedConfig, match="up to 8 tokens of a row"):
        opened.steps("self:4+8/3,2")
    assert opened.steps("ngram/3,2"), "which runs on the host"


def test_the_stamp_kernel_compiles_for_gpus_that_are_not_here_and_reads_their_timer():
    pytest.importorskip("triton")
    from specdec_kernels.contract import compile_kernel
    from specdec_kernels.stamp import gpu_kernels

    signature = {"table": "*i64", "number": "*i64", "rows": "i32", "row_stride": "i32", "column": "i32"}
    for sm in (80, 90):
        unaligned = ("rows", "row_stride", "column", "table")
        made = compile_kernel(gpu_kernels.stamp_kernel, signature, {}, sm, num_warps=1, unaligned=unaligned, name="stamp")
        assert not made.faults
        assert made.registers < 32


@pytest.mark.parametrize("config", ["self:4+12/chain3", "model:full/chain2", "self:4+12/3,2", "model:4+8/tree:-1,0,-1,0,2"])
@pytest.mark.parametrize("forced", ["0.7", "ranks:0.5,0.2"])
def test_forced_acceptance_accepts_on_the_device_what_it_accepts_on_the_host(config, forced, pair):
    workload = sd.Workload("forced", tiny.prompts([5, 33, 70]), 40, seed=4, temperature=0.8, stop_at_eos=False)
    seen = {}
    for rounds in ("host", "device"):
        run = sd.record(sd.Engine(pair, forced=forced, rounds=rounds).steps(workload, config))
        seen[rounds] = [(s.accepted, s.ranks) for s in run.rounds]
        assert any("forced" in label for label in run.header.labels)
    assert seen["device"] == seen["host"]
    assert sum(sum(accepted) for accepted, _ in seen["host"]) > 0
