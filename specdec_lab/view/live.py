"""A run in the background that can be watched: one thread drains the stream, one thread shows it.

The stream never waits for a browser: a step costs it one append. Stop and pause are flags that the draining thread
reads between two steps, so nothing that was recorded is lost. Knows records, streams, summaries and traces only.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from uuid import uuid4

from ..records import Run, RunHeader, StepRecord
from ..stream import Sink, Stream, record
from ..summary import Comparison, compare
from ..trace import TraceWriter
from .fallback import run_html
from .forms import display_form, is_notebook
from .publisher import Publisher
from .tables import render_table

MAX_WAITING_STEPS = 65_536  # of the view alone; a full deque loses pixels, never records
JOIN_S = 2.0
HOLD_S = 0.2  # how often a paused run looks whether it was stopped meanwhile
COMPARE_SHARE = 0.05  # of the time between two runs at most

_named: dict[str, LiveRun] = {}


class LiveRun:
    """A started run: watch it, pause it, stop it, wait for it.

    streams    one stream, or one per block of a profile, made one after the other by a generator
    sinks_for  further readers for each stream, such as a TraceWriter; context managers are entered and left
    on_done    called with this object by the draining thread when all streams have ended or were stopped
    """

    def __init__(
        self,
        streams: Stream | Iterable[Stream],
        *,
        title: str,
        name: str = "run",
        sinks_for: Callable[[RunHeader], Sequence[Sink]] = lambda header: (),
        on_done: Callable[[LiveRun], None] = lambda live: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.name = title, name
        self.events: deque[tuple[RunHeader, StepRecord]] = deque(maxlen=MAX_WAITING_STEPS)
        self.num_seen = 0
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self.is_interrupted = False
        self._streams = (streams,) if isinstance(streams, Stream) else streams
        self._sinks_for, self._on_done, self._clock = sinks_for, on_done, clock
        self._runs: list[Run] = []
        self._steps: list[StepRecord] = []  # of the stream that is being drained
        self._compared: tuple[Comparison, ...] = ()
        self._is_compared_anew = self._is_final = False
        self._next_compare = 0.0
        self._stop, self._go = threading.Event(), threading.Event()
        self._go.set()
        self._worker = threading.Thread(target=self._work, name=f"specdec-run-{name}", daemon=True)
        self._id = uuid4().hex[:12]
        self._form = display_form()
        self._widget: Any = None
        self._display: Any = None
        self._publisher = Publisher(self, self._id, line=None if is_notebook() else sys.stderr, clock=clock)

    # What a user does with a run.

    def start(self) -> LiveRun:
        """Begin; an earlier run of the same name is closed first. Returns this object."""
        earlier = _named.pop(self.name, None)
        if earlier is not None and not earlier.close():
            self._publisher.note(f"the earlier run {self.name!r} is still finishing its step")
        _named[self.name] = self
        self._worker.start()
        self._publisher.start()
        return self

    def stop(self) -> None:
        """End the run at the next step boundary; everything recorded is kept."""
        self._stop.set()
        self._go.set()

    def pause(self) -> None:
        """Hold the run at the next step boundary."""
        self._go.clear()

    def resume(self) -> None:
        """Go on after a pause."""
        self._go.set()

    def wait(self, timeout: float | None = None) -> list[Run]:
        """Wait for the end and return all runs; a fault of the run is raised here.

        An interrupt stops the run at the next step boundary and returns what was recorded. TimeoutError leaves it running.
        """
        if not self._worker.ident:
            raise RuntimeError(f"run {self.name!r} was never started; call start() first")
        try:
            is_over = self.finished.wait(timeout)
        except KeyboardInterrupt:
            self.stop()
            is_over = self.finished.wait()
        if not is_over:
            raise TimeoutError(f"run {self.name!r} has not ended after {timeout} s; it goes on, stop() ends it")
        self._publisher.join(JOIN_S)
        if self.error is not None:
            raise self.error
        return list(self._runs)

    def close(self) -> bool:
        """Stop, wait a little for the threads, and take the widget away. False while a long step is still going on."""
        self.stop()
        self.join(JOIN_S)
        if self._widget is not None:
            self._widget.close()
            self._widget = None
            self.renew_display()
        return not self._worker.is_alive()

    def join(self, timeout: float) -> None:
        """Wait this long for each of the two threads."""
        for thread in (self._worker, self._publisher):
            if thread.ident and thread is not threading.current_thread():
                thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether steps may still come."""
        return self._worker.is_alive()

    @property
    def state(self) -> str:
        """new, running, paused, stopping, finished, stopped or failed."""
        if self.finished.is_set():
            return "failed" if self.error else "stopped" if self.is_interrupted else "finished"
        if not self._worker.ident:
            return "new"
        if self._stop.is_set():
            return "stopping"
        return "running" if self._go.is_set() else "paused"

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that have ended, in order."""
        return tuple(self._runs)

    @property
    def num_runs(self) -> int:
        """How many runs have ended."""
        return len(self._runs)

    def comparison(self) -> tuple[Comparison, ...]:
        """Every configuration that has ended against plain decoding of the same cell."""
        return compare(self.runs)

    # The draining thread.

    def _work(self) -> None:
        try:
            self._drain_all()
            self._on_done(self)
        except BaseException as error:  # carried to whoever waits: a thread has nobody else to tell
            self.error = error
        finally:
            self.finished.set()

    def _drain_all(self) -> None:
        streams = iter(self._streams)
        try:
            for stream in streams:
                self._keep(self._drain(stream))
                if self._stop.is_set():
                    break
        finally:
            self.is_interrupted = self._stop.is_set()
            close = getattr(streams, "close", None)
            if close is not None:
                close()

    def _drain(self, stream: Stream) -> Run:
        self._steps = []
        with contextlib.ExitStack() as stack:
            stack.push(self._keep_what_a_fault_left(stream.header))
            sinks = [_entered(stack, sink) for sink in self._sinks_for(stream.header)]
            run = record(stream, self._sink_of(stream.header), *sinks, stop=self._is_stopped_at_boundary)
            for sink in sinks:
                if isinstance(sink, TraceWriter):
                    sink.close(interrupted=run.interrupted)
        return run

    def _sink_of(self, header: RunHeader) -> Sink:
        steps, events = self._steps, self.events

        def show(step: StepRecord) -> None:
            steps.append(step)
            events.append((header, step))
            self.num_seen += 1

        return show

    def _keep_what_a_fault_left(self, header: RunHeader) -> Callable[..., None]:
        def keep(kind: type[BaseException] | None, *_: object) -> None:
            if kind is not None and self._steps:
                self._runs.append(Run(header, tuple(self._steps), interrupted=True))

        return keep

    def _is_stopped_at_boundary(self) -> bool:
        while not self._go.wait(HOLD_S) and not self._stop.is_set():
            pass
        return self._stop.is_set()

    def _keep(self, run: Run) -> None:
        """Between two runs nothing is being timed: the moment to compare, if that does not hold up the next one."""
        self._runs.append(run)
        self._publisher.note(_run_words(run))
        begun = self._clock()
        if begun >= self._next_compare:
            self._compared, self._is_compared_anew = self.comparison(), True
            now = self._clock()
            self._next_compare = now + (now - begun) / COMPARE_SHARE

    def take_comparisons(self) -> tuple[Comparison, ...]:
        """The newest comparisons, once; after the end, those of all runs."""
        if self.finished.is_set():
            return self._presentable()
        is_new, self._is_compared_anew = self._is_compared_anew, False
        return self._compared if is_new else ()

    def _presentable(self) -> tuple[Comparison, ...]:
        """While the run lives, what the draining thread compared last: comparing here would disturb what it times."""
        if self.finished.is_set() and not self._is_final:
            self._compared, self._is_final = self.comparison(), True
        return self._compared

    # Showing it.

    def __repr__(self) -> str:
        return f"<LiveRun {self.name!r} {self.state}, {self.num_runs} runs ended, {self.num_seen} steps seen>"

    def __str__(self) -> str:
        return f"{self.headline()}\n{render_table(self._presentable())}"

    def headline(self) -> str:
        """One line: what it is, how it stands, how to stop it."""
        words = f"{self.title}: {self.state}, {self.num_seen:,} steps, {self.num_runs} runs ended"
        if self.error is not None:
            return f"{words}; {type(self.error).__name__}: {self.error}"
        return f"{words}; in the background, stop it with .stop() or %specdec stop" if self.is_alive else words

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if self._form.kind == "text":
            return {"text/plain": str(self)}
        ended = self.runs if self.finished.is_set() else ()
        html = run_html(self.headline(), self._presentable(), ended, self._form)
        bundle: dict[str, Any] = {"text/html": html, "text/plain": str(self)}
        if self._widget is not None:
            bundle |= {k: v for k, v in self._widget._repr_mimebundle_()[0].items() if k not in bundle}
        return bundle

    def _ipython_display_(self) -> None:
        """Shown with a display id, so that what is saved in the notebook can be renewed when the run has ended."""
        if not is_notebook() or self._form.kind == "text":
            raise NotImplementedError  # IPython then asks for the mimebundle
        from IPython.display import display

        if self._form.kind == "live" and self._widget is None:
            self._make_widget()
        self._publisher.static_display = self._widget is None
        show: Any = display  # untyped in IPython
        self._display = show(self._repr_mimebundle_(), raw=True, display_id=f"specdec-{self._id}")

    def _make_widget(self) -> None:
        from .widget import LiveWidget

        widget = LiveWidget()
        widget.on_command(self._obey)
        self._publisher.attach(widget)
        self._widget = widget

    def _obey(self, word: str) -> None:
        {"stop": self.stop, "pause": self.pause, "resume": self.resume}[word]()

    def renew_display(self) -> None:
        """Replace what the notebook keeps by the present state."""
        if self._display is not None:
            self._display.update(self._repr_mimebundle_(), raw=True)


def _run_words(run: Run) -> str:
    header = run.header
    block = "" if header.block is None else f" block {header.block}"
    return f"{header.cell} {header.config}{block}: {len(run.rounds)} rounds{', interrupted' if run.interrupted else ''}"


def _entered(stack: contextlib.ExitStack, sink: Sink) -> Sink:
    if isinstance(sink, contextlib.AbstractContextManager):
        stack.enter_context(sink)
    return sink


def live_run(name: str = "run") -> LiveRun | None:
    """The run that was last started under this name."""
    return _named.get(name)


def close_all() -> None:
    """Stop every run, join its threads and take its widget away."""
    while _named:
        _named.popitem()[1].close()


@atexit.register
def _stop_all() -> None:
    """At exit the kernel can no longer be sent anything: only let the threads leave at a step boundary."""
    for live in _named.values():
        live.stop()
        live.join(JOIN_S)
