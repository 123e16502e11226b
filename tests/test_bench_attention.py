"""`bench attention` in a world whose costs are known: structure, ratios, bytes and labels; no speed without a green check."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specdec_kernels.tree_attention import cpu
from specdec_lab.bench import attention as bench
from specdec_lab.bench import kernel_targets, neighbours
from specdec_lab.bench.attention import AttentionIsRed, Instruments, attention
from specdec_lab.bench.attention_results import BUSY, CACHE_UNKNOWN, FITS, TOO_FAST
from specdec_lab.bench.kernel_shapes import CALLS, QUERIES, SHAPES, TREE, KernelShape
from specdec_lab.bench.kernel_targets import TargetBackend, contestants
from specdec_lab.cli import main
from specdec_lab.engine import conformance
from specdec_lab.engine.attention import Need, ReferenceBackend
from specdec_lab.engine.conformance import NotConforming
from specdec_lab.engine.conformance.report import Report
from specdec_lab.records import ParseError, TreeShape

SHAPE = KernelShape.parse("3x70/2x16")
LITTLE = Need("cpu", torch.float32, 16, 1, max_queries=3, window=False)
ONE = 1 / 64  # seconds, dyadic: sums are exact
REAL = [target for target in ("native", "avx2") if cpu.why_not(16, torch.float32, target) is None]


class World:
    """A clock that only the made back ends move, and what they saw."""

    def __init__(self):
        self.now, self.cpu_per_s, self.seen = 0.0, 1.0, []

    def backend(self, name, per_query, first=0.0):
        return Costed(self, name, per_query, first)

    def instruments(self, **changes):
        tools = Instruments(
            clock=lambda: self.now, cpu_clock=lambda: self.now * self.cpu_per_s, read_bytes_per_s=lambda threads: 1e8 * threads,
            cache_bytes=1 << 14, load=lambda: 0.25, busy_s=lambda: self.now,
        )
        return replace(tools, **changes)


class Costed(ReferenceBackend):
    """The meaning, at a known price: first + per_query * queries; a plan costs an hour."""

    def __init__(self, world, name, per_query, first):
        self.world, self.name, self._cost = world, name, lambda queries: first + per_query * queries

    def plan(self, reads, cache, group, sliding=None):
        self.world.now += 3600
        return super().plan(reads, cache, group, sliding)

    def attend(self, q, cache, layer, plan, scale):
        self.world.now += self._cost(q.shape[1])
        self.world.seen.append((self.name, q.shape[1], layer, torch.get_num_threads()))
        return super().attend(q, cache, layer, plan, scale)


def green(backend):
    """A report of one case, so that a made world need not wait for a thousand."""
    return Report(backend.name, (conformance.judge(ReferenceBackend(), next(conformance.cases(LITTLE))),))


def measure(world=None, tools=None, **options):
    world = world or World()
    usual = {
        "queries": (1, 4), "tree": TreeShape.parse("2,1"), "dtypes": ("float32",), "threads": (1, 2), "blocks": 3,
        "backends": {"cpu": world.backend("cpu", ONE, ONE), "sdpa": world.backend("sdpa", 4 * ONE)}, "check": green,
        "instruments": world.instruments(**tools or {}),
    }  # fmt: skip
    return attention((SHAPE,), **{**usual, **options})


def test_ratios_and_medians_are_those_of_the_known_costs():
    report = measure()
    for setting in report.settings:
        medians = {(t.backend, t.num_queries): t.call_s.median for t in setting.timings}
        assert medians == {("cpu", 1): 2 * ONE, ("cpu", 4): 5 * ONE, ("cpu", 5): 6 * ONE,
                           ("sdpa", 1): 4 * ONE, ("sdpa", 4): 16 * ONE, ("sdpa", 5): 20 * ONE}  # fmt: skip
        tree = setting.find("sdpa", "tree 2,1 (5)")
        assert setting.over_one_query(tree).mean == pytest.approx(5)
        assert setting.over(tree, "cpu").mean == pytest.approx(20 / 6)
        assert setting.over(tree, "cpu").num_blocks == 3
        assert setting.over_one_query(setting.find("cpu", "chain of 1")) is None


def test_every_call_is_made_in_every_block_in_turns_and_on_the_threads_asked_for():
    world, before = World(), torch.get_num_threads()
    report = measure(world, threads=(2,))
    assert torch.get_num_threads() == before
    calls = world.seen[6:]  # the first six are the check of every call against float64
    assert len(calls) == (3 + bench.WARM_UP_BLOCKS) * 6 * CALLS
    assert {threads for *_, threads in calls} == {2}
    blocks = [[call[:2] for call in calls[at : at + 6 * CALLS]] for at in range(0, len(calls), 6 * CALLS)]
    for block in blocks:
        assert all(block.count(call) == CALLS for call in block)
        assert block[:6] == block[6:12][::-1], "there and back, so that a drift cancels"
    assert len({tuple(block) for block in blocks}) > 1, "shuffled anew"
    layers = [layer for _, _, layer, _ in calls]
    assert layers == [(layers[0] + at) % report.settings[0].num_layers for at in range(len(layers))]
    assert {t.call_s.count for t in report.settings[0].timings} == {3 * CALLS}


def test_a_plan_is_made_outside_the_clock():
    assert max(t.call_s.p95 for setting in measure().settings for t in setting.timings) < 1


def test_bytes_are_exact_and_the_share_is_of_the_read_stream_on_as_many_threads():
    one, two = measure().settings
    timing = one.find("cpu", "chain of 4")
    assert timing.kv_bytes == 2 * 3 * 2 * (70 + 4) * 16 * 4
    assert timing.kv_bytes_per_s == timing.kv_bytes / (5 * ONE)
    assert (one.read_share(timing), two.read_share(timing)) == pytest.approx(
        (timing.kv_bytes_per_s / 1e8, timing.kv_bytes_per_s / 2e8)
    )


def test_a_layer_is_cold_again_when_its_turn_comes():
    cache_bytes = 1 << 16
    setting = measure(tools={"cache_bytes": cache_bytes}).settings[0]
    layer = SHAPE.kv_bytes(5, 4)
    assert (setting.num_layers - 1) * layer < bench.COLD * cache_bytes <= setting.num_layers * layer
    assert FITS not in setting.labels
    huge = measure(tools={"cache_bytes": 1 << 30}).settings[0]
    assert huge.num_layers == bench.MAX_LAYERS
    assert FITS in huge.labels
    assert FITS in str(measure(tools={"cache_bytes": 1 << 30}))
    assert CACHE_UNKNOWN in measure(tools={"cache_bytes": None}).settings[0].labels


def test_a_speed_above_memory_is_labelled():
    assert TOO_FAST not in measure().settings[0].labels
    assert TOO_FAST in measure(tools={"read_bytes_per_s": lambda threads: 1.0}).settings[0].labels


def test_work_of_others_is_labelled():
    world = World()
    quiet = measure(world, threads=(1,))
    assert quiet.settings[0].labels == ()
    assert quiet.settings[0].other_cores == 0
    busy = World()
    beside = measure(busy, threads=(1,), tools={"busy_s": lambda: 1.75 * busy.now})
    assert beside.settings[0].other_cores == 0.75
    assert BUSY in beside.settings[0].labels
    assert "other work had up to 0.8 cores in 1 of 1 tables: do not quote those" in str(beside)
    starved = World()
    starved.cpu_per_s = 0.5
    assert BUSY in measure(starved, threads=(1,), tools={"busy_s": lambda: None}).settings[0].labels


def test_a_red_conformance_check_ends_everything_before_a_clock_is_read():
    world = World()

    class Wrong(Costed):
        def attend(self, q, cache, layer, plan, scale):
            return super().attend(q, cache, layer, plan, scale) * 1.001

    def no_clock():
        raise AssertionError("the clock was read")

    wrong = {"cpu": world.backend("cpu", ONE), "sdpa": Wrong(world, "sdpa", ONE, 0.0)}
    with pytest.raises(AttentionIsRed, match=r"sdpa: RED, .*\n(.*\n)*views: 0/0 \+ chain of 1"):
        measure(world, backends=wrong, check=lambda backend: conformance.check(backend, LITTLE),
                tools={"clock": no_clock})  # fmt: skip


def test_a_call_that_is_wrong_in_the_measured_shape_only_is_red_too():
    world = World()

    class WrongWhenLong(Costed):
        def attend(self, q, cache, layer, plan, scale):
            return super().attend(q, cache, layer, plan, scale) * (1.001 if plan.longest > 70 else 1)

    with pytest.raises(AttentionIsRed, match="cpu in 3x70/2x16 float32, chain of 1: row 2 is wrong by 0.001, 4e-06 is allowed"):
        measure(world, backends={"cpu": WrongWhenLong(world, "cpu", ONE, 0.0)})
    assert len(world.seen) == 1


def test_who_cannot_run_is_named_with_the_reason_and_the_others_go_on():
    world = World()

    class Cannot(Costed):
        def why_not(self, need):
            return "there is no C compiler"

    class NoBfloat16(Costed):
        def why_not(self, need):
            return "no bfloat16 here" if need.dtype == torch.bfloat16 else None

    backends = {"cpu": Cannot(world, "cpu", ONE, 0), "sdpa": world.backend("sdpa", ONE), "x": NoBfloat16(world, "x", ONE, 0)}
    report = measure(world, backends=backends, dtypes=("float32", "bfloat16"), threads=(1,),
                     check=lambda backend: conformance.check(backend, LITTLE))  # fmt: skip
    assert [setting.backends for setting in report.settings] == [("sdpa", "x"), ("sdpa",)]
    assert report.skipped == {"cpu": "there is no C compiler", "x in 3x70/2x16 bfloat16": "no bfloat16 here"}
    assert "not measured, cpu: there is no C compiler" in str(report)
    with pytest.raises(ValueError, match="nothing could be timed. cpu: there is no C compiler"):
        measure(world, backends={"cpu": backends["cpu"]}, check=lambda backend: conformance.check(backend, LITTLE))


def test_a_shape_that_does_not_fit_is_skipped_with_the_bytes():
    world = World()
    backends = {"cpu": world.backend("cpu", ONE)}
    shapes = (KernelShape.parse("1000000x1000000/8x128"), SHAPE)
    report = attention(shapes, queries=(1,), dtypes=("float32",), threads=(1,), blocks=1, backends=backends, check=green,
                       instruments=world.instruments())  # fmt: skip
    assert [setting.shape for setting in report.settings] == [SHAPE]
    assert "bytes" in report.skipped["1000000x1000000/8x128 float32"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queries": (65,)}, "1 to 64 queries per sequence, got chain of 65"),
        ({"queries": (), "tree": None}, "got none"), ({"blocks": 0}, "at least 1 block, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_timed_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        measure(**options)


def test_the_tables_say_everything_once():
    report = measure(threads=(1,))
    lines = str(report).splitlines()
    layers = report.settings[0].num_layers
    assert lines[0] == f"3x70/2x16 float32, 1 thread: 0.0545 MB of KV a call, {layers} layers in turn, read stream 0.1 GB/s"
    assert " ".join(lines[1].split()) == "queries cpu ms x 1 query GB/s of read sdpa ms x 1 query x cpu"
    assert lines[3].split()[:6] == ["chain", "of", "4", "78.12", "(78.12-78.12)", "2.50"]
    assert lines[3].endswith("3.20 (3.20-3.20)")
    assert "conformance: cpu 1 cases; sdpa 1 cases, all green" in lines[-1]
    markdown = report.to_markdown().splitlines()
    assert markdown[0].startswith("**3x70/2x16 float32")
    assert markdown[2].startswith("| queries | cpu ms |")
    assert markdown[3] == "| --- |" + " --: |" * 7
    assert all(line.count("|") == 9 for line in markdown[2:7])


def test_a_ratio_whose_interval_says_nothing_is_called_unsure():
    one_block = str(measure(blocks=1, threads=(1,)))
    assert "3.20 (unsure)" in one_block


def test_rows_are_complete_in_themselves_and_plain_json():
    rows = measure().rows()
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert row.keys() >= {"schema", "device", "machine", "versions", "commit", "created", "load_average", "labels", "shape"}
        assert row["device"].endswith(f"_{row['threads']}t")
        assert row["conformance"]["cpu"]["verdict"] == "green"
        last = row["results"][-1]
        assert (last["backend"], last["queries"], last["median_s"]) == ("sdpa", "tree 2,1 (5)", 20 * ONE)
        assert last["over"]["cpu"]["mean"] == pytest.approx(20 / 6)
        assert last["over_one_query"]["num_blocks"] == 3


def test_shapes_are_spelled_as_they_are_read():
    for shape in SHAPES:
        assert KernelShape.parse(str(shape)) == shape
    assert KernelShape.parse("8x8k/4x64g2") == KernelShape.parse("8x8192/4x64g2")
    assert (KernelShape.parse("2x9/3x16").group, KernelShape.parse("2x9/3x16g4").group) == (1, 4)
    with pytest.raises(ParseError, match="'8x4096' is not BATCHxLENGTH/KVHEADSxDIM"):
        KernelShape.parse("8x4096")
    with pytest.raises(ValueError, match="at least 1"):
        KernelShape.parse("8x4096/0x64")
    assert {len(QUERIES), TREE.num_nodes + 1} == {6, 16}


@pytest.mark.parametrize("target", REAL)
def test_a_build_of_the_kernel_conforms_and_says_what_it_cannot(target):
    need = Need("cpu", torch.bfloat16, 16, 2, max_queries=129, tree=True, sliding=True)
    report = conformance.check(TargetBackend(target), need)
    report.raise_if_red()
    assert set(report.refusals) == {
        f"cpu:{target} takes up to 64 queries per sequence", f"cpu:{target} attends plainly, and on CPUs only"
    }  # fmt: skip


def test_the_build_that_is_asked_for_is_the_one_that_runs(monkeypatch):
    asked, real = [], cpu.tree_attention
    monkeypatch.setattr(kernel_targets.cpu, "tree_attention", lambda *a, **k: asked.append(k["target"]) or real(*a, **k))
    for target in REAL:
        conformance.judge(TargetBackend(target), next(conformance.cases(LITTLE)))
    assert list(dict.fromkeys(asked)) == REAL


@pytest.mark.parametrize(
    ("capability", "names"), [("AVX512", ["cpu", "sdpa", "cpu:native", "cpu:avx2"]), ("AVX2", ["cpu", "sdpa"])]
)  # fmt: skip
def test_builds_are_compared_where_the_machine_has_two(monkeypatch, capability, names):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert list(contestants()) == names


def test_the_processor_time_of_others_is_what_the_system_counts_beyond_ours(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 9999 888 4 5 6 77 0\ncpu0 1 2 3\n")
    ticks = neighbours.os.sysconf("SC_CLK_TCK")
    assert neighbours.busy_s(stat) == (100 + 20 + 30 + 4 + 5 + 6) / ticks
    assert neighbours.busy_s(tmp_path / "absent") is None
    assert neighbours.other_cores(10.0, 16.0, 2.0, 8.0) == 0.5
    assert neighbours.other_cores(10.0, 11.0, 2.0, 8.0) == 0
    assert neighbours.other_cores(None, 11.0, 2.0, 8.0) is None


# The shell.


@pytest.fixture
def little_check(monkeypatch, tmp_path):
    """A check of a few cases, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("specdec_lab.engine.conformance.judging.cases", lambda need: conformance.cases(LITTLE))


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    code = main([str(word) for word in words], out=out, err=err)
    return code, out.getvalue(), err.getvalue()


WORDS = ("bench", "attention", "--shapes", "2x40/1x16,1x40/1x16g2", "--queries", "1,3", "--tree", "2", "--threads", "1",
         "--dtypes", "float32", "--blocks", "1", "--db", "db")  # fmt: skip


def test_the_command_prints_tables_and_saves_a_line_per_setting_only_when_asked(little_check):
    code, out, err = call(*WORDS)
    assert code == 0
    assert out.count("x 1 query") == 2 * 2
    assert "attention back end sdpa: green" in err
    assert not Path("db").exists()
    code, out, _ = call(*WORDS, "--save", "--json")
    report, lines = json.loads(out), Path("db/bench/attention.jsonl").read_text().splitlines()
    assert [json.loads(line)["results"] for line in lines] == [setting["results"] for setting in report["settings"]]
    assert [json.loads(line)["shape"] for line in lines] == ["2x40/1x16", "1x40/1x16g2"]
    assert call(*WORDS, "--markdown")[1].count("| queries | ") == 2


def test_a_red_check_prints_no_speed_and_ends_with_1(little_check, monkeypatch):
    class Wrong(ReferenceBackend):
        name = "sdpa"

        def attend(self, q, cache, layer, plan, scale):
            return super().attend(q, cache, layer, plan, scale * 1.01)

    monkeypatch.setitem(kernel_targets.BACKENDS, "sdpa", Wrong())
    code, out, _ = call(*WORDS, "--save")
    assert code == 1
    assert "sdpa: RED" in out
    assert out.endswith("no speed is given\n")
    assert " ms" not in out
    assert not Path("db/bench/attention.jsonl").exists()
    assert "RED" in json.loads(call(*WORDS, "--json")[1])["error"]
    with pytest.raises(NotConforming):
        conformance.check(Wrong()).raise_if_red()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shapes", "8x4096"), "is not BATCHxLENGTH/KVHEADSxDIM"), (("--dtypes", "float16"), "'float16' is none of"),
        (("--queries", "0"), "at least 1"), (("--tree", "9,9"), "1 to 64 queries per sequence"),
        (("--json", "--markdown"), "not allowed with"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(little_check, words, message):
    code, out, err = call("bench", "attention", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
