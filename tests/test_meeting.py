"""How ranks end together, without processes: two meetings at one store, their exits noted instead of made."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch

from specdec_lab.engine.models import meeting as place
from specdec_lab.engine.models.meeting import Meeting, is_started_together


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(place, "LOOK_S", 0.01)
    monkeypatch.setattr(place, "PATIENCE_S", 0.3)
    monkeypatch.setattr(place.atexit, "register", lambda work: None)
    monkeypatch.delattr(sys, "last_type", raising=False)
    store, exits = torch.distributed.HashStore(), {0: [], 1: []}
    made = [Meeting(store, rank, 2, exits[rank].append).start() for rank in range(2)]
    yield made, exits
    for each in made:
        each._stop.set()


def soon(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_who_fails_first_speaks_and_the_other_ends_with_its_code(two):
    (first, second), exits = two
    assert second.end(2)
    assert not first.end(1), "another one spoke before"
    second.leave()


def test_a_rank_that_works_on_is_ended_with_the_code_of_the_one_that_failed(two):
    (first, second), exits = two
    assert second.end(3)
    second.leave()
    assert soon(lambda: exits[0])
    assert exits == {0: [3], 1: []}
    assert not first._met["sum"]


def test_ranks_that_leave_in_order_wait_for_each_other_and_then_do_what_comes_after(two):
    (first, second), exits = two
    done = []
    for each in (first, second):
        each.before_leaving(lambda rank=each.rank: done.append(f"before {rank}"))
        each.after_leaving(lambda rank=each.rank: done.append(f"after {rank}"))
    for each in (first, second):
        each.met()
    early = threading.Thread(target=first.leave)
    early.start()
    time.sleep(0.1)
    assert done == ["before 0"], "the other one still works"
    second.leave()
    early.join(5)
    assert sorted(done) == ["after 0", "after 1", "before 0", "before 1"]
    assert exits == {0: [], 1: []}


@pytest.mark.parametrize("kind", place.KIND)
def test_who_waits_for_a_rank_that_has_left_says_so_and_ends(two, kind, capsys):
    (first, second), exits = two
    first.met(kind)
    early = threading.Thread(target=second.leave)
    early.start()
    assert soon(lambda: exits[0])
    early.join(5)
    assert exits == {0: [1], 1: []}
    assert "rank 1 ended while rank 0 still waited for it" in capsys.readouterr().err


def test_a_process_alone_has_nobody_to_meet():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert is_started_together({**alone, "WORLD_SIZE": "2"})
    assert not is_started_together(alone)
    assert not is_started_together({"RANK": "1", "WORLD_SIZE": "2"})
