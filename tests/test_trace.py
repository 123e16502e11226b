"""A run on disk is the run: round trips, cuts at every byte, full disks, and a timeline the viewer can open."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zlib
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import header, off_step, prefill_step, round_step, run_of
from specdec_lab import trace
from specdec_lab.records import PHASES, Run
from specdec_lab.stream import record
from specdec_lab.trace import TraceError, TraceWriter, perfetto, read_run, replay, write_perfetto, write_run

NAMES = ("run.jsonl", "run.jsonl.gz")
seconds = st.floats(0, 1e3, allow_nan=False)
same_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def small_run(num_rounds: int = 3, **overrides: object) -> Run:
    rounds = [round_step((i % 4, 2), index=i + 1, kv_read_bytes=1000 * i) for i in range(num_rounds)]
    return run_of(prefill_step(), *rounds, **overrides)


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    return zlib.decompress(data, 31) if path.suffix == ".gz" else data


@st.composite
def runs(draw: st.DrawFn) -> Run:
    rows = draw(st.integers(1, 4))
    steps = []
    for index in range(draw(st.integers(0, 4))):
        accepted = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
        cut = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        extra = draw(st.fixed_dictionaries(dict.fromkeys(PHASES, seconds)))
        sampled = draw(st.none() | seconds)
        flags = draw(st.sampled_from([(), ("busy",), ("busy", "floor-above-measured")]))
        frozen = draw(st.sets(st.integers(0, rows - 1)))
        steps.append(
            round_step(accepted, index=index, censored=cut, frozen=frozen, context_cost_s=sampled, flags=flags, **extra)
        )
    labels = draw(st.sampled_from([(), ("forced",), ("random-weights", "KV fits in cache")]))
    return run_of(*steps, cell=f"{rows}x512", labels=labels, block=draw(st.none() | st.integers(0, 9)))


@pytest.mark.parametrize("name", NAMES)
@same_directory
@given(run=runs(), interrupted=st.booleans())
def test_a_run_read_back_is_the_run_that_was_written(tmp_path: Path, name: str, run: Run, interrupted: bool) -> None:
    run = Run(run.header, run.steps, interrupted)
    write_run(run, tmp_path / name, overwrite=True)
    result = read_run(tmp_path / name)
    assert result.run == run
    assert result.num_skipped == 0


@pytest.mark.parametrize("name", NAMES)
def test_replay_is_the_same_stream(tmp_path: Path, name: str) -> None:
    run = small_run()
    stream = replay(write_run(run, tmp_path / name))
    assert stream.header == run.header
    assert record(stream) == run


def test_replay_reads_no_further_than_it_is_asked(tmp_path: Path) -> None:
    path = write_run(small_run(5000), tmp_path / "run.jsonl")
    with replay(path) as stream:
        first = next(stream)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert first == prefill_step()
        with pytest.warns(UserWarning, match="1 lines were cut"):
            assert 0 < len(list(stream)) < 5000


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_readable_before_the_next_one_comes(tmp_path: Path, name: str) -> None:
    run = small_run()
    writer = TraceWriter(tmp_path / name, run.header)
    for count, step in enumerate(run.steps, start=1):
        writer(step)
        result = read_run(tmp_path / name)
        assert result.run == Run(run.header, run.steps[:count], interrupted=True)
        assert result.num_skipped == 0
    writer.close()
    assert read_run(tmp_path / name).run == run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ended", [True, False], ids=["end line", "step line"])
def test_a_file_cut_at_any_byte_of_its_last_line_loses_that_line_only(tmp_path: Path, name: str, ended: bool) -> None:
    run, path = small_run(), tmp_path / name
    writer = TraceWriter(path, run.header)
    for step in run.steps[:-1] if not ended else run.steps:
        writer(step)
    start = path.stat().st_size
    if ended:
        writer.close()
    else:
        writer(run.steps[-1])
    whole = path.read_bytes()
    writer.close()
    kept, lost = (run.steps, ()) if ended else (run.steps[:-1], run.steps[-1:])
    seen = set()
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        result = read_run(path)
        assert path.read_bytes() == whole[:size]
        assert result.run.steps in (kept, kept + lost)  # the last byte is only the line's end
        assert result.num_skipped <= 1
        seen.add((len(result.run.steps) > len(kept), result.num_skipped))
    assert (False, 1) in seen
    assert (False, 0) in seen


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_anywhere_reads_as_a_beginning_of_the_run_or_as_no_trace(tmp_path: Path, name: str) -> None:
    run, path = small_run(2), tmp_path / name
    with TraceWriter(path, run.header):
        header_size = path.stat().st_size
    whole = write_run(run, path, overwrite=True).read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size < header_size - 10:
            with pytest.raises(ValueError, match="a run header must come first"):
                read_run(path)
        elif size >= header_size:
            steps = read_run(path).run.steps
            assert steps == run.steps[: len(steps)]


FOREIGN = ["not json", '{"a": 1}', "[1, 2]", "null", '{"end": 3}', '{"index": 1, "drafted": 5}', "\udcff", "NaN"]


@pytest.mark.parametrize("line", FOREIGN)
def test_a_foreign_line_is_skipped_with_a_count(tmp_path: Path, line: str) -> None:
    run = small_run()
    lines = unpacked(write_run(run, tmp_path / "a.jsonl")).splitlines(keepends=True)
    foreign = line.encode(errors="surrogateescape") + b"\n"
    (tmp_path / "b.jsonl").write_bytes(b"".join([lines[0], foreign, *lines[1:3], foreign, b"\n", *lines[3:]]))
    result = read_run(tmp_path / "b.jsonl")
    assert result.run == run
    assert result.num_skipped == 2
    with pytest.warns(UserWarning, match="2 lines"):
        assert tuple(replay(tmp_path / "b.jsonl")) == run.steps


def test_a_step_of_another_batch_and_steps_behind_the_end_are_foreign(tmp_path: Path) -> None:
    run = small_run()
    other = unpacked(write_run(run_of(off_step(rows=3)), tmp_path / "other.jsonl")).splitlines(keepends=True)
    lines = unpacked(write_run(run, tmp_path / "a.jsonl")).splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join([*lines[:2], other[1], *lines[2:], lines[2]]))
    result = read_run(tmp_path / "b.jsonl")
    assert result.run == run
    assert result.num_skipped == 2


def test_damage_inside_a_gzip_keeps_what_came_before_and_counts(tmp_path: Path) -> None:
    path = write_run(small_run(400), tmp_path / "run.jsonl.gz")
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 4
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)
    result = read_run(path)
    assert result.num_skipped >= 1
    assert result.run.interrupted
    assert 250 < len(result.run.steps) < 400
    assert result.run.steps == small_run(400).steps[: len(result.run.steps)]


@pytest.mark.parametrize(
    "text", ["", "hello\n", "[]\n", '{"schema": "other/9"}\n', '{"schema": "specdec_lab.run/1", "cell": 3}\n', "\n"]
)
def test_a_missing_or_foreign_header_is_a_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    for read in (read_run, replay):
        with pytest.raises(ValueError, match=r"x\.jsonl is no trace: a run header must come first"):
            read(path)


def test_a_trace_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    path = write_run(small_run(), tmp_path / "run.jsonl")
    before = path.read_bytes()
    with pytest.raises(TraceError, match="overwrite=True"):
        TraceWriter(path, header())
    assert path.read_bytes() == before
    write_run(small_run(1), path, overwrite=True)
    assert read_run(path).run == small_run(1)


def test_an_exception_in_the_with_block_marks_the_run_interrupted(tmp_path: Path) -> None:
    run = small_run()

    def fail() -> None:
        with TraceWriter(tmp_path / "run.jsonl", run.header) as writer:
            writer(run.steps[0])
            raise RuntimeError("engine stopped")

    with pytest.raises(RuntimeError, match="engine stopped"):
        fail()
    assert read_run(tmp_path / "run.jsonl").run == Run(run.header, run.steps[:1], interrupted=True)


def test_a_writer_is_a_sink_of_record(tmp_path: Path) -> None:
    run = small_run()
    with TraceWriter(tmp_path / "b.jsonl", run.header) as writer:
        recorded = record(replay(write_run(run, tmp_path / "a.jsonl")), writer)
    assert recorded == run
    assert writer.num_steps == len(run.steps)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    with pytest.raises(TraceError, match="the trace is closed"):
        writer(run.steps[0])


def test_a_directory_that_cannot_be_written_is_said_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none/run\.jsonl: No such file or directory; 0 steps are kept") as caught:
        TraceWriter(tmp_path / "none" / "run.jsonl", header())
    assert caught.value.num_kept == 0
    assert caught.value.path == tmp_path / "none" / "run.jsonl"


FULL_DISK = """
    import resource, sys
    from builders import header, round_step
    from specdec_lab.trace import TraceError, TraceWriter
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    count = 0
    try:
        with TraceWriter(sys.argv[1], header()) as writer:
            for count in range(1000):
                writer(round_step(index=count))
    except TraceError as error:
        assert error.num_kept == count, (error.num_kept, count)
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit of the system")
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_says_what_was_kept_and_keeps_it_whole(tmp_path: Path, name: str) -> None:
    limit = 5003
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / name), str(limit)]
    paths = [str(Path(__file__).parent), str(Path(trace.__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(paths)}, check=True)
    result = read_run(tmp_path / name)
    kept = len(result.run.steps)
    assert f"File too large; {kept} steps are kept in it" in done.stdout
    assert kept > 5
    assert result.num_skipped == 0  # the half line was removed
    assert result.run.steps == tuple(round_step(index=i) for i in range(kept))
    assert result.run.interrupted


def test_a_disk_too_full_for_the_header_leaves_no_file_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "run.jsonl"), "100"]
    paths = [str(Path(__file__).parent), str(Path(trace.__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(paths)}, check=True)
    assert "File too large; 0 steps" in done.stdout
    assert not (tmp_path / "run.jsonl").exists()


def test_a_number_that_json_cannot_keep_is_named(tmp_path: Path) -> None:
    with (
        TraceWriter(tmp_path / "run.jsonl", header()) as writer,
        pytest.raises(ValueError, match=r"step 7 holds .*context_cost_s"),
    ):
        writer(round_step(index=7, context_cost_s=float("inf")))
    assert read_run(tmp_path / "run.jsonl").num_skipped == 0


# --- the timeline ---


def events(run: Run, **wanted: object) -> list[dict[str, object]]:
    return [e for e in perfetto(run)["traceEvents"] if all(e.get(k) == v for k, v in wanted.items())]


@given(run=runs())
@settings(max_examples=40)
def test_slices_of_a_track_never_overlap_and_phases_fill_their_round(run: Run) -> None:
    rounds, phases = events(run, ph="X", tid=1), events(run, ph="X", tid=2)
    assert len(rounds) == len(run.steps)
    for track in (rounds, phases):
        spans = [(Fraction(e["ts"]), Fraction(e["ts"]) + Fraction(e["dur"])) for e in track]
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        # What the viewer does: nanoseconds by truncation. Eighths of a microsecond survive it unchanged.
        assert all(int(e[key] * 1000) == Fraction(e[key]) * 1000 for e in track for key in ("ts", "dur"))
    filled = sum(Fraction(e["dur"]) for e in phases)
    assert abs(filled - sum(Fraction(e["dur"]) for e in rounds)) <= Fraction(len(run.steps), 8)


def test_the_timeline_is_what_the_chrome_trace_format_asks_for() -> None:
    run = small_run(labels=("forced",))
    data = json.loads(json.dumps(perfetto(run)))
    assert data["distributedInfo"] == {"rank": 0}
    assert data["otherData"]["run_id"] == run.header.run_id
    for event in data["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        keys = {"X": {"ts", "dur", "tid"}, "C": {"ts"}, "M": {"args"}}[event["ph"]]
        assert keys <= event.keys()
    assert [e["args"]["name"] for e in events(run, ph="M", name="thread_name")] == ["rounds", "phases"]
    assert events(run, ph="M", name="process_labels")[0]["args"] == {"labels": "forced"}
    assert [e["name"] for e in events(run, ph="X", tid=1)][:2] == ["prefill", "self:4+60/chain3"]


def test_measured_phases_carry_their_seconds_and_modelled_values_say_so() -> None:
    step = round_step((2, 2), kv_floor_s=0.1, kv_read_bytes=4000)
    names = [e["name"] for e in events(run_of(step), ph="X", tid=2)]
    assert names == [name.removesuffix("_s") for name in PHASES]
    attention = events(run_of(step), name="attention")[0]
    assert attention["dur"] == step.attention_s * 1e6
    expected = {"measured_s": step.attention_s, "modelled kv_floor_s": 0.1, "modelled kv_read_bytes": 4000}
    assert attention["args"] == expected


def test_counters_show_acceptance_context_and_kv_rate_of_live_rows() -> None:
    step = round_step((3, 1), frozen=[1], context_tokens=(600, 900), kv_read_bytes=4000)
    values = {e["name"]: e["args"]["value"] for e in events(run_of(step), ph="C")}
    assert values == {
        "tokens per live row": 4,
        "context tokens, mean of live rows": 600,
        "KV bytes/s of verify (modelled bytes, measured time)": 4000 / step.attention_s,
    }
    forced = [e["name"] for e in events(run_of(step, labels=("forced",)), ph="C")]
    assert "tokens per live row (acceptance: forced)" in forced


@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_a_written_timeline_is_the_timeline_and_replaces_an_older_one(tmp_path: Path, name: str) -> None:
    write_perfetto(small_run(1), tmp_path / name)
    path = write_perfetto(small_run(2), tmp_path / name)
    assert json.loads(unpacked(path)) == json.loads(json.dumps(perfetto(small_run(2))))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_timeline_too_large_for_the_viewer_asks_for_gzip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "PERFETTO_MAX_BYTES", 2000)
    with pytest.raises(ValueError, match=r"write to t\.json\.gz"):
        write_perfetto(small_run(), tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
    write_perfetto(small_run(), tmp_path / "t.json.gz")
