"""The thread that shows a run while it happens: drains the sink's deque and sends packets on the kernel's own clock.

It never talks to the engine. What it cannot send in time is merged or left out of the picture, never out of the run.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ..records import RunHeader, StepRecord, forced_label
from .feed import Feed
from .figures import titled

if TYPE_CHECKING:
    from .widget import LiveWidget

TICK_S = 0.1
SLOW_SEND_S = 0.02  # above this 95th percentile, half as many ticks
KEYFRAME_S = 5.0
META_S = 1.0
STATIC_S = 2.0
LINE_S = 0.5


class Shown(Protocol):
    """What the publisher asks of a run."""

    name: str
    title: str
    events: deque[tuple[RunHeader, StepRecord]]
    num_seen: int
    finished: threading.Event

    @property
    def state(self) -> str: ...
    @property
    def error(self) -> BaseException | None: ...
    @property
    def num_runs(self) -> int: ...
    def take_comparisons(self) -> Any: ...
    def renew_display(self) -> None: ...


class Publisher(threading.Thread):
    """Ten ticks a second while the run lives, and one last keyframe."""

    def __init__(self, shown: Shown, run_id: str, *, line: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name=f"specdec-view-{shown.name}", daemon=True)
        self.feed = Feed(run_id)
        self._shown = shown
        self._clock = clock
        self._line = line if line is not None and line.isatty() else None
        self._widget: LiveWidget | None = None
        self._begun = clock()
        self._due = dict.fromkeys(("keyframe", "meta", "static", "line"), 0.0)
        self._state = ""
        self._about: RunHeader | None = None
        self._send_s: deque[float] = deque(maxlen=20)
        self._log: deque[tuple[float, str]] = deque(maxlen=50)
        self._lock = threading.Lock()  # the widget's first keyframe is made by the thread that displays it
        self.num_drained = 0
        self.static_display = False

    def run(self) -> None:
        """Until the run has finished."""
        while not self._shown.finished.wait(self.period_s):
            self.tick()
        self.finish()

    @property
    def period_s(self) -> float:
        """Seconds between ticks; doubled while sending is slow."""
        slowest = sorted(self._send_s)[int(0.95 * len(self._send_s))] if self._send_s else 0.0
        return 2 * TICK_S if slowest > SLOW_SEND_S else TICK_S

    def attach(self, widget: LiveWidget) -> None:
        """Show the run in this widget from now on."""
        with self._lock:
            self._drain()
            widget.publish(self.feed.keyframe(self._meta(everything=True)))
            self._widget = widget

    def note(self, words: str) -> None:
        """A line for the log panel of the view."""
        self._log.append((self._clock() - self._begun, words))

    def tick(self) -> None:
        """Drain, then send what is due."""
        with self._lock:
            self._drain()
            if self._widget is not None:
                self._send(self._widget)
        if self.static_display and self._is_due("static", STATIC_S):
            self._shown.renew_display()
        if self._line is not None and self._is_due("line", LINE_S):
            self._write_line(self._line)

    def finish(self) -> None:
        """What the notebook keeps, then the last keyframe: a view that says "finished" is saved as finished."""
        self._shown.renew_display()
        with self._lock:
            self._drain()
            if self._widget is not None:
                self._widget.publish(self.feed.keyframe(self._meta(everything=True)))
        if self._line is not None:
            self._line.write("\r\x1b[K")
            self._line.flush()

    def _drain(self) -> None:
        events = self._shown.events
        while events:
            known = len(self.feed.events)
            self.feed.add(*events.popleft())
            self.num_drained += 1
            for words in self.feed.events[known:]:
                self.note(words)
        comparisons = self._shown.take_comparisons()
        if comparisons:
            self.feed.set_speedups(comparisons)

    def _send(self, widget: LiveWidget) -> None:
        begun = self._clock()
        state = self._shown.state
        if state != self._state or self._is_due("keyframe", KEYFRAME_S):
            self._state = state
            self._due["keyframe"] = begun + KEYFRAME_S
            widget.publish(self.feed.keyframe(self._meta(everything=True)))
        elif self._is_due("meta", META_S):
            widget.publish(self.feed.delta(self._meta(everything=False)))
        elif self.feed.has_news():
            widget.publish(self.feed.delta())
        self._send_s.append(self._clock() - begun)

    def _is_due(self, what: str, every_s: float) -> bool:
        now = self._clock()
        if now < self._due[what]:
            return False
        self._due[what] = now + every_s
        return True

    @property
    def num_dropped(self) -> int:
        """Steps that the full deque pushed out before they were drawn."""
        return max(0, self._shown.num_seen - self.num_drained - len(self._shown.events))

    def _meta(self, *, everything: bool) -> dict[str, Any]:
        """The words around the pictures; the long ones with a keyframe or when another run begins."""
        shown, header = self._shown, self.feed.header
        meta: dict[str, Any] = {
            "state": shown.state,
            "elapsed": round(self._clock() - self._begun, 1),
            "steps": self.feed.num_steps,
            "dropped": self.num_dropped,
            "runs": shown.num_runs,
        }
        if header is not None:
            meta |= _place(header, self.feed.last_step)
            meta["event"] = self.feed.events[-1] if self.feed.events else ""
        if everything or header is not self._about:
            self._about = header
            title = titled(shown.title, header.labels if header else ())
            meta |= {"title": title, "name": shown.name, "log": list(self._log), **_about(header)}
            meta["error"] = "" if shown.error is None else f"{type(shown.error).__name__}: {shown.error}"
        return meta

    def status_line(self) -> str:
        """One line for a terminal: where the run is and how fast."""
        feed, shown = self.feed, self._shown
        words = [f"specdec {shown.name}: {shown.state}"]
        if feed.header is not None and feed.last_step is not None:
            place = _place(feed.header, feed.last_step)
            tally = feed.tallies.get((feed.header.workload, place["cell"], place["config"]))
            block = "" if place["block"] is None else f" block {place['block']}"
            words.append(f"{place['cell']} {place['config']}{block}")
            words += [forced] if (forced := forced_label(feed.header.labels)) else []
            words.append(f"round {feed.num_steps:,}, context {place['context']:,}")
            words += [f"{tally.tokens_per_s:,.1f} tokens/s"] if tally else []
            words += feed.events[-1:]
        return " · ".join([*words, f"{self._clock() - self._begun:.0f} s"])

    def _write_line(self, line: TextIO) -> None:
        width = shutil.get_terminal_size().columns - 1
        line.write(f"\r\x1b[K{self.status_line()[:width]}")
        line.flush()


def _place(header: RunHeader, step: StepRecord | None) -> dict[str, Any]:
    alive = [n for n, tokens in zip(step.context_tokens, step.tokens, strict=True) if tokens] if step else []
    return {
        "cell": str(header.cell),
        "config": step.config if step and step.kind == "round" else header.config,
        "block": header.block,
        "phase": step.kind if step else "",
        "context": round(sum(alive) / len(alive)) if alive else 0,
        "labels": list(header.labels),
    }


def _about(header: RunHeader | None) -> dict[str, Any]:
    if header is None:
        return {}
    return {
        "backend": header.backend,
        "refused": dict(header.refused),
        "workload": header.workload,
        "target": str(header.target.get("name", "")),
        "device": str(header.machine.get("device", "")),
        "read_bytes_per_s": header.ceilings.get("read_bytes_per_s"),
        "instrumented": header.instrumented,
    }
