from __future__ import annotations

import io
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import comm
import pytest

from builders import header, round_step
from specdec_lab.records import RunHeader, StepRecord
from specdec_lab.view.feed import Packet
from specdec_lab.view.publisher import TICK_S, Publisher
from specdec_lab.view.widget import LiveWidget

# The publisher.


@dataclass
class FakeRun:
    """A run as the publisher sees it, moved by the test."""

    name: str = "fake"
    title: str = "fake run"
    events: deque[tuple[RunHeader, StepRecord]] = field(default_factory=lambda: deque(maxlen=100))
    num_seen: int = 0
    finished: threading.Event = field(default_factory=threading.Event)
    state: str = "running"
    error: BaseException | None = None
    num_runs: int = 0
    num_renewals: int = 0

    def add(self, step: StepRecord, head: RunHeader) -> None:
        self.events.append((head, step))
        self.num_seen += 1

    def take_comparisons(self) -> tuple[()]:
        return ()

    def renew_display(self) -> None:
        self.num_renewals += 1


@dataclass
class FakeWidget:
    """Keeps what it is sent; sending takes as long as the test says."""

    clock: list[float]
    send_s: float = 0.0
    packets: list[Packet] = field(default_factory=list)

    def publish(self, packet: Packet) -> None:
        self.packets.append(packet)
        self.clock[0] += self.send_s


def publisher(shown: FakeRun, line: Any = None) -> tuple[Publisher, list[float]]:
    clock = [100.0]
    return Publisher(shown, "id", line=line, clock=lambda: clock[0]), clock


def test_between_keyframes_a_tick_sends_one_delta_and_a_quiet_tick_sends_nothing() -> None:
    shown, head = FakeRun(), header()
    made, clock = publisher(shown)
    widget = FakeWidget(clock)
    made.attach(widget)  # type: ignore[arg-type]
    made.tick()
    kinds = []
    for index in range(110):
        clock[0] += 0.1
        if index % 2 == 0:
            shown.add(round_step(index=index), head)
        before = len(widget.packets)
        made.tick()
        kinds += [p.head["k"] for p in widget.packets[before:]]
        assert len(widget.packets) - before <= 1
    assert kinds.count("k") == 2  # one each five seconds
    assert 55 <= kinds.count("d") <= 66  # rounds on every other tick, and words once a second
    assert [p.head["seq"] for p in widget.packets] == list(range(1, len(widget.packets) + 1))


def test_a_change_of_state_sends_a_keyframe_at_once() -> None:
    shown = FakeRun()
    made, clock = publisher(shown)
    widget = FakeWidget(clock)
    made.attach(widget)  # type: ignore[arg-type]
    made.tick()
    for state in ("paused", "running", "stopping"):
        shown.state = state
        made.tick()
        assert widget.packets[-1].head["k"] == "k"
        assert widget.packets[-1].head["meta"]["state"] == state


def test_slow_sending_halves_the_ticks() -> None:
    shown = FakeRun()
    made, clock = publisher(shown)
    widget = FakeWidget(clock, send_s=0.03)
    made.attach(widget)  # type: ignore[arg-type]
    assert made.period_s == TICK_S
    for i in range(20):
        shown.add(round_step(index=i), header())
        clock[0] += 0.1
        made.tick()
    assert made.period_s == 2 * TICK_S


def test_steps_that_a_full_deque_pushed_out_are_counted() -> None:
    shown, head = FakeRun(), header()
    made, clock = publisher(shown)
    widget = FakeWidget(clock)
    for i in range(130):
        shown.add(round_step(index=i), head)
    made.attach(widget)  # type: ignore[arg-type]
    assert widget.packets[-1].head["meta"]["dropped"] == 30


def test_the_last_keyframe_is_sent_and_the_saved_output_renewed_at_the_end() -> None:
    shown = FakeRun()
    made, clock = publisher(shown)
    widget = FakeWidget(clock)
    made.attach(widget)  # type: ignore[arg-type]
    shown.add(round_step(), header())
    shown.state = "finished"
    made.finish()
    assert widget.packets[-1].head["k"] == "k"
    assert widget.packets[-1].head["meta"]["state"] == "finished"
    assert widget.packets[-1].head["n"] == 1
    assert shown.num_renewals == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_at_most_twice_a_second() -> None:
    shown, line = FakeRun(), Terminal()
    made, clock = publisher(shown, line)
    for i in range(50):
        shown.add(round_step(index=i), header())
        clock[0] += 0.1
        made.tick()
    text = line.getvalue()
    assert "\n" not in text
    assert 9 <= text.count("\r") <= 11
    assert "2x512 self:4+60/chain3" in text
    assert "tokens/s" in made.status_line()


def test_a_pipe_gets_nothing() -> None:
    shown, line = FakeRun(), io.StringIO()
    made, _ = publisher(shown, line)
    shown.add(round_step(), header())
    made.tick()
    made.finish()
    assert line.getvalue() == ""


# The widget.


class RecordingComm(comm.base_comm.BaseComm):  # type: ignore[misc]
    """A comm without a browser: keeps its messages."""

    sent: list[tuple[str, Any, Any]]

    def publish_msg(self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **_: Any) -> None:
        self.__dict__.setdefault("sent", []).append((msg_type, data, buffers))


@pytest.fixture
def _recording_comms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "create_comm", RecordingComm)


@pytest.mark.usefixtures("_recording_comms")
def test_a_delta_is_one_message_and_a_keyframe_is_the_snapshot() -> None:
    widget, made = LiveWidget(), Publisher(FakeRun(), "id", line=None)
    channel = widget.comm
    opened = len(channel.sent)
    made.feed.add(header(), round_step())
    widget.publish(made.feed.delta())
    made.feed.add(header(), round_step())
    widget.publish(made.feed.keyframe({}))
    (_, delta, rows), (_, keyframe, _) = channel.sent[opened:]
    assert delta["method"] == "custom"
    assert delta["content"]["seq"] == 1
    assert len(rows) == 1
    assert keyframe["method"] == "update"
    assert Packet.from_bytes(widget.snapshot).head["seq"] == 2
    widget.close()


@pytest.mark.usefixtures("_recording_comms")
def test_only_the_words_of_our_buttons_are_obeyed() -> None:
    widget, heard = LiveWidget(), []
    widget.on_command(heard.append)
    for content in ({"do": "stop"}, {"do": "rm"}, "stop", {"do": "pause"}, {}):
        message = {"content": {"data": {"method": "custom", "content": content}}, "buffers": []}
        widget.comm.handle_msg(message)
    assert heard == ["stop", "pause"]
    widget.close()


@pytest.mark.usefixtures("_recording_comms")
def test_replies_are_not_routed_to_the_last_publishers_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    widget, made = LiveWidget(), Publisher(FakeRun(), "id", line=None)
    monkeypatch.setattr("specdec_lab.view.widget.ipykernel_version", lambda: (7, 4))
    widget.comm.__dict__["_reply_subshell_id"] = None
    widget.publish(made.feed.delta())
    assert "_reply_subshell_id" not in widget.comm.__dict__
    widget.close()
