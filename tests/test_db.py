"""tuning_db: whole lines, on disk before anybody acts, never rewritten, shared by several writers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_lab.records import Cell, SpecConfig
from specdec_lab.tune import Database, DatabaseError, Design, Measurement, find_database, locations, merge, read_file
from specdec_lab.tune.db import append_lines, measurement_id
from specdec_lab.tune.shelf import describe
from world import IDENTITY

CONFIG = "self:4+60/chain3"


def measurement(number=0, config=CONFIG, **changes):
    fp = IDENTITY.of(SpecConfig.parse(config))
    fields = {
        "id": measurement_id(number, config), "kind": "race", "run": "r1", "fp": fp, "workload": "prose", "temperature": 0.0,
        "cell": Cell(2, 512), "config": config, "design": Design(number, "ABBA", "m-0", 7, "prose"),
        "summary": {"tokens_per_s": 100.125 + number, "log_speedup": 0.1}, "env": {"utc": "2026-01-02T03:04:05Z"},
    }  # fmt: skip
    return Measurement(**{**fields, **changes})


def database(root):
    return Database(root, IDENTITY, "tiny", draft="tiny-draft")


def test_a_measurement_survives_its_line():
    one = measurement(3, warm={"seconds": 0.5}, raw_sha256="ab", extra={"of_a_newer_writer": [1]})
    assert Measurement.from_dict(json.loads(one.line())) == one
    assert "\n" not in one.line()
    failed = measurement(4, status="oom", reason="123 bytes", summary={})
    assert Measurement.from_dict(json.loads(failed.line())) == failed


def test_measurements_lie_in_a_file_per_drafter_below_their_device(tmp_path):
    db = database(tmp_path)
    for config in ("off", CONFIG, "ngram/chain4", "model:4+60/chain2"):
        db.append(measurement(0, config))
    files = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.jsonl"))]
    assert files == [f"TEST_CPU_2t/tiny--{name}.jsonl" for name in ("ngram", "off", "self", "tiny-draft")]
    again = database(tmp_path)
    assert {m.config for m in again} == {"off", CONFIG, "ngram/chain4", "model:4+60/chain2"}
    assert not again.skipped


def test_a_fingerprint_is_explained_once_per_file(tmp_path):
    for number in range(3):
        database(tmp_path).append(measurement(number))
    lines = [json.loads(line) for line in database(tmp_path).path_of(CONFIG).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["fingerprint", "race", "race", "race"]
    assert lines[0]["fp"] == lines[1]["fp"]
    assert (lines[0]["base"], lines[0]["drafter"]) == (dict(IDENTITY.base), {"kind": "self"})


def test_the_same_id_is_written_once(tmp_path):
    db = database(tmp_path)
    db.append(measurement(1))
    db.append(measurement(1))
    assert len(read_file(db.path_of(CONFIG)).measurements) == len(db) == 1


def test_find_prefers_a_good_record_to_a_failed_one(tmp_path):
    db = database(tmp_path)
    failed = measurement(1, id="m-a", status="throttled", reason="busy")
    good = measurement(1, id="m-b")
    db.append(failed, good, measurement(1, id="m-c"))
    assert db.find(good.key) == good
    assert database(tmp_path).find(good.key) == good
    assert db.find(measurement(2).key) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"schema": "specdec_lab.measurement/1", "id": "m-', "truncated"),
        ("not json at all", "truncated"),
        ('{"schema": "somebody.else/1", "id": "x"}', "foreign"),
        ("[1, 2]", "foreign"),
        ('"text"', "foreign"),
        ('{"schema": "specdec_lab.measurement/0"}', "foreign"),
        ('{"schema": "specdec_lab.measurement/1", "id": "m-1", "kind": "race"}', "foreign"),
        (measurement(5).line().replace("chain3", "chainsaw"), "foreign"),
        (measurement(5).line().replace('"race"', '"fun"'), "foreign"),
        (measurement(5).line().replace('"cell":"2x512"', '"cell":7'), "foreign"),
        (measurement(5).line().replace("measurement/1", "measurement/2"), "newer"),
        (measurement(0).line(), "duplicate"),
        ("\x00\x01\xff", "truncated"),
    ],
)
def test_lines_that_are_not_ours_are_counted_and_left_alone(tmp_path, line, reason):
    db = database(tmp_path)
    db.append(measurement(0))
    path = db.path_of(CONFIG)
    with path.open("a") as stream:
        stream.write(line + "\n")
    before = path.read_bytes()
    again = database(tmp_path)
    assert dict(again.skipped) == {reason: 1}
    assert len(again) == 1
    again.append(measurement(1))
    assert path.read_bytes().startswith(before), "append-only: what was there is never rewritten"
    assert len(database(tmp_path)) == 2


def test_a_line_cut_by_a_crash_does_not_swallow_the_next(tmp_path):
    db = database(tmp_path)
    db.append(measurement(0), measurement(1))
    path = db.path_of(CONFIG)
    os.truncate(path, path.stat().st_size - 40)
    again = database(tmp_path)
    again.append(measurement(2))
    final = database(tmp_path)
    assert {m.design.block for m in final} == {0, 2}
    assert dict(final.skipped) == {"truncated": 1}


@settings(max_examples=30)
@given(st.lists(st.integers(0, 400), max_size=6))
def test_any_prefix_of_a_file_is_a_valid_file(tmp_path_factory, cuts):
    path = tmp_path_factory.mktemp("db") / "f.jsonl"
    text = "".join(measurement(n).line() + "\n" for n in range(3))
    for cut in cuts:
        path.write_text(text[: len(text) - cut])
        contents = read_file(path)
        assert list(contents.measurements) == [measurement(n) for n in range(len(contents.measurements))]
        assert sum(contents.skipped.values()) <= 1


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def half_a_write(monkeypatch):
    """A disk that takes half a line and then is full."""
    real = os.write
    left = [1]

    def write(handle, data):
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left.pop()
        return real(handle, bytes(data)[: len(data) // 2])

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("broken", ["fsync", "write", "half"])
def test_a_full_disk_keeps_the_measurement_and_says_so(tmp_path, monkeypatch, broken):
    db = database(tmp_path)
    db.append(measurement(0))
    path = db.path_of(CONFIG)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        if broken == "half":
            half_a_write(patch)
        else:
            patch.setattr(os, broken, fail_with(errno.ENOSPC))
        with pytest.raises(DatabaseError, match="No space left on device.*1 finished measurements are kept") as caught:
            db.append(measurement(1))
    assert caught.value.measurements == (measurement(1),) == tuple(db.pending)
    assert (caught.value.path, str(path) in str(caught.value)) == (path, True)
    assert path.read_bytes() == before, "no half line is left behind"
    db.append(measurement(2))
    assert [m.design.block for m in read_file(path).measurements] == [0, 1, 2]
    assert not db.pending


def test_a_read_only_folder_is_found_out_before_anything_is_measured(tmp_path, monkeypatch):
    db = database(tmp_path)
    monkeypatch.setattr(os, "open", fail_with(errno.EROFS))
    with pytest.raises(DatabaseError, match=r"off.jsonl: cannot be written: Read-only file system. .*--db PATH"):
        db.check_writable()


def test_a_database_below_a_file_names_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseError, match="cannot be written: (Not a directory|File exists)"):
        database(tmp_path / "file").append(measurement(0))


WRITER = """
import sys
sys.path[:0] = {path!r}
from test_db import database, measurement
db = database({root!r})
for n in range({first}, {first} + 60):
    db.append(measurement(n, summary={{"text": "x" * 700, "log_speedup": 0.0}}))
"""


def test_two_processes_interleave_whole_lines(tmp_path):
    path = [str(Path(__file__).parent), *sys.path]
    code = [WRITER.format(path=path, root=str(tmp_path), first=first) for first in (0, 1000)]
    running = [subprocess.Popen([sys.executable, "-c", text]) for text in code]
    assert [process.wait() for process in running] == [0, 0]
    db = database(tmp_path)
    assert {m.design.block for m in db} == {*range(60), *range(1000, 1060)}
    assert not db.skipped
    assert db.path_of(CONFIG).read_text().count('"kind":"fingerprint"') == 1


# Merging


def shelf(root, numbers):
    db = database(root)
    for number in numbers:
        db.append(measurement(number, CONFIG if number % 2 else "ngram/chain2"))
    return root


def ids(root):
    return {m.id for m in database(root)}


@settings(max_examples=20)
@given(st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)))
def test_merge_is_the_union_by_id_in_any_order(tmp_path_factory, a, b, c):
    tmp = tmp_path_factory.mktemp("merge")
    sources = [shelf(tmp / name, numbers) for name, numbers in zip("abc", (a, b, c), strict=True)]
    done = merge(*sources, into=tmp / "abc")
    backwards = merge(*reversed(sources), into=tmp / "cba")
    union = {measurement(n, CONFIG if n % 2 else "ngram/chain2").id for n in a | b | c}
    assert ids(tmp / "abc") == ids(tmp / "cba") == union
    assert done.added == backwards.added == len(union)
    again = merge(*sources, into=tmp / "abc")
    assert (again.added, again.conflicts) == (0, ())


def test_merge_keeps_explanations_leaves_foreign_lines_and_reports_conflicts(tmp_path):
    ours, theirs = shelf(tmp_path / "ours", [1]), shelf(tmp_path / "theirs", [1, 3])
    path = database(theirs).path_of(CONFIG)
    with path.open("a") as stream:
        stream.write("broken\n" + measurement(5, id="m-x").line() + "\n")
    with database(ours).path_of(CONFIG).open("a") as stream:
        stream.write(measurement(6, id="m-x").line() + "\n")
    done = merge(theirs, into=ours)
    assert (done.added, done.known, done.conflicts, dict(done.skipped)) == (1, 2, ("m-x",), {"truncated": 1})
    text = database(ours).path_of(CONFIG).read_text()
    assert "broken" not in text
    assert text.count('"kind":"fingerprint"') == 1
    fresh = tmp_path / "fresh"
    merge(theirs, into=fresh)
    assert next(iter(read_file(database(fresh).path_of(CONFIG)).fingerprints)) == measurement(1).fp


def test_a_file_that_git_merged_by_union_is_read_as_a_set(tmp_path):
    path = tmp_path / "f.jsonl"
    lines = [measurement(n).line() for n in (3, 1, 2, 1, 3)]
    append_lines(path, lines)
    contents = read_file(path)
    assert sorted(m.design.block for m in contents.measurements) == [1, 2, 3]
    assert contents.skipped == {"duplicate": 2}


# Which database


def test_the_first_folder_that_exists_is_used_and_never_the_shipped_one(tmp_path, monkeypatch):
    project, home = tmp_path / "project", tmp_path / "home"
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    user = home / "specdec_lab" / "tuning_db"
    assert find_database(project=project).path == project / "tuning_db"
    user.mkdir(parents=True)
    assert find_database(project=project).path == user
    (project / "tuning_db").mkdir(parents=True)
    assert find_database(project=project).path == project / "tuning_db"
    assert find_database(tmp_path / "mine", project).path == tmp_path / "mine"
    places = locations(project=project)
    assert [place.writable for place in places] == [True, True, False]
    assert describe(project=project).count("new lines go here") == 1
