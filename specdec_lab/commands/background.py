"""What goes on while a notebook is idle: generations, a tuning, and the verbs `stop` and `status`."""

from __future__ import annotations

import html
import threading
from argparse import Namespace
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ..view.forms import display_form, is_notebook
from ..view.live import LiveRun
from .lab import Lab
from .mistakes import UserMistake
from .outcome import Outcome, StreamJob, Words
from .policies import policy_words
from .tuning import TuneJob, progress_line

if TYPE_CHECKING:
    from ..policy import Policy
    from ..summary import Comparison
    from ..tune import Progress

REFRESH_S, JOIN_S = 1.0, 2.0


class JobRun(LiveRun):
    """A LiveRun that quotes only what its job lets stand, and that can be read where it generated text."""

    def __init__(self, job: StreamJob) -> None:
        super().__init__(
            job.streams, title=job.title, name=job.name, sinks_for=job.sinks_for, on_done=lambda live: _conclude(job, live)
        )
        self._job = job

    def comparison(self) -> tuple[Comparison, ...]:
        """Every configuration against plain decoding of the same cell, as far as it may be quoted."""
        return super().comparison() if self._job.compare is None else self._job.compare(self.runs)

    def texts(self) -> list[str]:
        """What the runs that ended generated, one text per prompt; nothing where the prompts were not the user's."""
        return [] if self._job.texts is None else self._job.texts(self.runs)

    def __str__(self) -> str:
        return "\n\n".join([*(self.texts() if self.finished.is_set() else ()), super().__str__()])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(include, exclude)
        if "text/html" not in bundle:
            return bundle
        texts = self.texts() if self.finished.is_set() else []
        shown = "".join(f'<pre style="white-space:pre-wrap">{html.escape(text)}</pre>' for text in texts)
        return {**bundle, "text/html": shown + bundle["text/html"]}


def _conclude(job: StreamJob, live: LiveRun) -> None:
    """Write what was asked for; a notebook shows the run itself, so the words are not needed."""
    job.conclude(live.runs)


def start(lab: Lab, job: StreamJob | TuneJob) -> LiveRun | LiveTune:
    """Begin a job in the background; what ran under its name is closed first."""
    earlier = lab.background.pop(job.name, None)
    if earlier is not None:
        earlier.close()
    if isinstance(job, TuneJob):
        tuning = LiveTune(job, keep=lambda policy: setattr(lab, "policy", policy))
        lab.background[job.name] = tuning
        return tuning.start()
    run = JobRun(job)
    lab.background[job.name] = run
    return run.start()


def stop(lab: Lab, args: Namespace) -> Outcome:
    """Stop one run, or all."""
    if args.name is not None and args.name not in lab.background:
        known = ", ".join(lab.background) or "nothing was started"
        raise UserMistake(f"nothing runs under the name {args.name!r}; known: {known}")
    names = [args.name] if args.name else list(lab.background)
    alive = [name for name in names if lab.background[name].is_alive]
    for name in alive:
        lab.background[name].stop()
    words = f"stopping {', '.join(alive)} at the next step; everything recorded is kept" if alive else "nothing is running"
    return Outcome(Words(words), words, {"stopping": alive})


def status(lab: Lab, args: Namespace) -> Outcome:
    """What runs, and on what."""
    lines = [live.headline() for live in lab.background.values()] or ["nothing was started"]
    engine = f"engine: {lab.engine!r}" if lab.engine is not None else "no engine is loaded; %specdec load loads one"
    words = "\n".join([*lines, engine])
    return Outcome(Words(words), words, {"runs": lines, "engine": repr(lab.engine)})


class _Carried:
    """Holds what ended a worker thread, for whoever waits for it."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.error = error
        return True


class LiveTune:
    """A tuning in the background: how far it is, who leads where, and at the end its policy.

    One thread measures; another renews the display once a second. `stop()` is read between two blocks.
    """

    def __init__(self, job: TuneJob, keep: Callable[[Policy], None] = lambda policy: None) -> None:
        self.name, self.title = job.name, job.title
        self.finished = threading.Event()
        self.policy: Policy | None = None
        self._job, self._keep = job, keep
        self._carried, self._stop = _Carried(), threading.Event()
        self._progress: Progress | None = None
        self._cells: dict[str, Progress] = {}
        self._display: Any = None
        self._form = display_form()
        self._worker = threading.Thread(target=self._work, name="specdec-tune", daemon=True)
        self._painter = threading.Thread(target=self._paint, name="specdec-view-tune", daemon=True)

    def start(self) -> LiveTune:
        """Begin; returns this object."""
        self._worker.start()
        self._painter.start()
        return self

    def stop(self) -> None:
        """End after the running block; everything recorded is kept, and the same command resumes."""
        self._stop.set()

    def close(self) -> bool:
        """Stop and wait a little; False while a block is still being measured."""
        self.stop()
        for thread in (self._worker, self._painter):
            if thread.ident:
                thread.join(JOIN_S)
        return not self._worker.is_alive()

    def wait(self, timeout: float | None = None) -> Policy:
        """The policy; an interrupt stops the tuning after its block, a fault of the run is raised here."""
        try:
            self.finished.wait(timeout)
        except KeyboardInterrupt:
            self.stop()
            self.finished.wait()
        if not self.finished.is_set():
            raise TimeoutError(f"the tuning has not ended after {timeout} s; it goes on, stop() ends it")
        if self._carried.error is not None:
            raise self._carried.error
        assert self.policy is not None
        return self.policy

    @property
    def is_alive(self) -> bool:
        """Whether blocks may still come."""
        return self._worker.is_alive()

    def headline(self) -> str:
        """One line on how it stands."""
        if self._carried.error is not None:
            return f"{self.title}: failed; {type(self._carried.error).__name__}: {self._carried.error}"
        if self.policy is not None:
            return f"{self.title}: {self.policy.headline()}"
        where = progress_line(self._progress) if self._progress else "starting"
        return f"{self.title}: {where}; stop it with .stop() or %specdec stop tune"

    def __str__(self) -> str:
        body = policy_words(self.policy) if self.policy else "\n".join(map(_cell_line, self._cells.values()))
        return f"{self.headline()}\n{body}".rstrip()

    def __repr__(self) -> str:
        return f"<LiveTune {self.headline()}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if self._form.kind == "text":
            return {"text/plain": str(self)}
        from .display import policy_html

        rows = "".join(f"<li>{html.escape(_cell_line(p))}</li>" for p in self._cells.values())
        body = policy_html(self.policy) if self.policy else f"<ul>{rows}</ul>"
        return {"text/html": f"<p><b>{html.escape(self.headline())}</b></p>{body}", "text/plain": str(self)}

    def _ipython_display_(self) -> None:
        if not is_notebook() or self._form.kind == "text":
            raise NotImplementedError  # IPython then asks for the mimebundle
        from IPython.display import display

        show: Any = display  # IPython's is not annotated
        self._display = show(self._repr_mimebundle_(), raw=True, display_id=f"specdec-{uuid4().hex[:12]}")

    def _work(self) -> None:
        with self._carried:
            self.policy = self._job.run(self._report, self._stop.is_set)
            self._keep(self.policy)
        self.finished.set()

    def _report(self, progress: Progress) -> None:
        self._progress = progress
        if progress.stage == "cell":
            self._cells[str(progress.cell)] = progress

    def _paint(self) -> None:
        while not self.finished.wait(REFRESH_S):
            self._renew()
        self._renew()

    def _renew(self) -> None:
        if self._display is not None:
            self._display.update(self._repr_mimebundle_(), raw=True)


def _cell_line(progress: Progress) -> str:
    won = "plain decoding" if progress.best == "off" else f"{progress.best} {progress.speedup:.2f}x"
    return f"{progress.cell} {progress.status}: {won}"
