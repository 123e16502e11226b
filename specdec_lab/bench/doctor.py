"""What this machine can run, how fast it reads and multiplies, and what is missing: facts with advice, nothing guessed.

Not known here: how it is printed where.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from html import escape
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import machine, sensors
from ..tune.shelf import describe

if TYPE_CHECKING:
    from ..engine.loop import Engine

OK, NOTE, MISSING = "ok", "note", "missing"
OPTIONAL = {"triton": "kernels on NVIDIA GPUs", "kaleido": "PNG pictures of figures", "jupyterlab": "notebooks"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. state: ok, note (works, but read this) or missing. advice: what to do, where there is something to do."""

    topic: str
    state: str
    what: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in reading order, and the numbers behind them."""

    findings: tuple[Finding, ...]
    facts: dict[str, Any]

    def __str__(self) -> str:
        width = max(len(finding.topic) for finding in self.findings)
        lines = []
        for f in self.findings:
            lines.append(f"{f.topic.ljust(width)}  {f.state.ljust(7)}  {f.what}" + (f". {f.advice}" if f.advice else ""))
        return "\n".join(lines)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return f"<table>{''.join(map(_html_row, self.findings))}</table>"

    @property
    def headline(self) -> str:
        """One line: machine, speed, back end."""
        by_topic = {finding.topic: finding.what for finding in self.findings}
        return "; ".join(by_topic[topic] for topic in ("machine", "ceilings", "back end") if topic in by_topic)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"findings": [asdict(finding) for finding in self.findings], "facts": self.facts}


def _html_row(finding: Finding) -> str:
    """With inline styles only, which an untrusted notebook keeps."""
    words = f"{finding.what}. {finding.advice}" if finding.advice else finding.what
    cells = (escape(finding.topic).replace("  ", "&#160;&#160;"), finding.state, escape(words))
    return "<tr>" + "".join(f'<td style="text-align:left;vertical-align:top">{cell}</td>' for cell in cells) + "</tr>"


def examine(
    engine: Engine | None, why_no_engine: str = "", *, database: str | os.PathLike[str] | None = None,
    reading: Callable[[], sensors.Reading] | None = None,
) -> Diagnosis:
    """Examine the machine, and the engine if there is one; `why_no_engine` says why not.

    reading  of the sensors, injected in tests
    """
    now, on_gpu = reading() if reading else _read_sensors(engine), engine is not None and _is_on_gpu(engine)
    findings = [
        *_machine(now), *_engine(engine, why_no_engine), _gpu(now, on_gpu), *_notebook(), _database(database), *_optional()
    ]
    facts: dict[str, Any] = {"machine": machine.facts(), "versions": machine.versions(), "commit": machine.commit()}
    if engine is not None:
        identity = engine.identity()
        facts |= {"device": identity.device, "ceilings": asdict(engine.ceilings), "base": dict(identity.base)}
    return Diagnosis(tuple(findings), facts)


def _is_on_gpu(engine: Engine) -> bool:
    return engine.pair.target.device.type == "cuda"


def _read_sensors(engine: Engine | None) -> sensors.Reading:
    """Of the engine's GPU, by its UUID: NVML counts GPUs that torch does not see."""
    gpu: int | str = 0
    if engine is not None and _is_on_gpu(engine):
        import torch

        gpu = str(torch.cuda.get_device_properties(engine.pair.target.device).uuid)
    watch = sensors.Sensors(gpu)
    try:
        return watch.read()
    finally:
        watch.close()


def _machine(now: sensors.Reading) -> Iterable[Finding]:
    facts = machine.facts()
    cache = facts["last_level_cache_bytes"]
    held = f"{cache / 2**20:.0f} MiB last-level cache" if cache else "last-level cache unknown"
    memory = f"{facts['memory_bytes'] / 2**30:.1f} GiB"
    software = f"{facts['os']}, Python {facts['python']}"
    yield Finding("machine", OK, f"{facts['cpu']}, {facts['cores']} cores, {memory}, {held}, {software}")
    load = now.load_average
    if isinstance(load, sensors.Absent):
        yield Finding("load", NOTE, str(load))
    else:
        is_busy = load > facts["cores"] / 2
        advice = "Other work disturbs every timing: stop it before you measure" if is_busy else ""
        words = f"{load:.1f} processes on {facts['cores']} cores in the last minute"
        yield Finding("load", NOTE if is_busy else OK, words, advice)
    commit = machine.commit()
    yield Finding("commit", NOTE, "unknown: not a checkout of ours") if commit == "unknown" else Finding("commit", OK, commit)


def _engine(engine: Engine | None, why_not: str) -> Iterable[Finding]:
    if engine is None:
        yield Finding("model", MISSING, why_not or "no model is loaded")
        return
    pair, rates = engine.pair, engine.ceilings
    yield Finding("model", OK, f"{pair.target.name} ({pair.target.shape.params:,} parameters) on {engine.identity().device}")
    if pair.draft is None:
        yield Finding("draft", NOTE, "no draft model is loaded", "self and ngram draft without one")
    else:
        yield Finding("draft", OK, f"{pair.draft.name} ({pair.draft.shape.params:,} parameters)")
    yield Finding("runner", OK, _runner_words(engine))
    yield _rounds(engine)
    yield _threads(engine.threads.most, machine.openmp_libraries())
    kind, threads = ("float32", ", all threads") if pair.target.device.type == "cpu" else ("bfloat16", "")
    yield Finding(
        "ceilings", OK, f"reads {rates.read_bytes_per_s / 1e9:.1f} GB/s (streams differ by {rates.read_spread:.0%}), "
        f"multiplies {rates.gemm_flops_per_s / 1e9:.0f} GFLOP/s in {kind} (measured just now{threads})",
    )
    yield from _backends(engine)


def _threads(most: int, libraries: tuple[str, ...]) -> Finding:
    words = f"up to {most}; each kind of forward runs on as many as were measured to be fastest"
    if len(libraries) <= 1:
        return Finding("threads", OK, words)
    several = f"{len(libraries)} OpenMP libraries are loaded ({', '.join(libraries)}), each with threads of its own"
    return Finding("threads", NOTE, f"{words}. {several}", "They compete for the cores: use one build of torch")


def _rounds(engine: Engine) -> Finding:
    """Where rounds run. As graphs on a GPU and in one compiled call on a CPU is as it should be."""
    is_best = engine.rounds.mode == "captured" or (not engine.rounds.on_device and "layer by layer" not in engine.where)
    return Finding("rounds", OK if is_best else NOTE, engine.where)


def _runner_words(engine: Engine) -> str:
    kind = engine.pair.target.kind
    return "fast: our own modules" if kind == "fast" else "hf: transformers' modules through our attention and cache"


def _backends(engine: Engine) -> Iterable[Finding]:
    from ..engine.backends import BACKENDS

    yield Finding("back end", OK, f"attention by {engine.backend.name}")
    need = engine.pair.target.need()
    for name, backend in BACKENDS.items():
        if name != engine.backend.name:
            reason = backend.why_not(need)
            yield Finding(f"  {name}", OK if reason is None else MISSING, reason or "can run this model; not the preferred one")


def _gpu(now: sensors.Reading, on_gpu: bool) -> Finding:
    if isinstance(now.power_w, sensors.Absent):
        advice = "No power, clocks or energy: throttling cannot be seen" if on_gpu else "Everything runs on the CPU without one"
        return Finding("GPU", NOTE, f"no GPU sensors: {now.power_w.reason}", advice)
    events = now.clock_events
    slowed = () if isinstance(events, sensors.Absent) else tuple(e for e in events if e not in sensors.HARMLESS_EVENTS)
    what = f"{now.power_w:.0f} W, {now.sm_mhz} MHz, {now.temperature_c} C"
    return Finding("GPU", NOTE if slowed else OK, f"{what}{'; slowed by ' + ', '.join(slowed) if slowed else ''}")


def _notebook() -> Iterable[Finding]:
    version = _version("ipykernel")
    if version is None:
        yield Finding("notebook", NOTE, "ipykernel is not installed", "pip install 'specdec_lab[notebook]' for the live view")
    else:
        state, advice = ipykernel_advice(version)
        yield Finding("notebook", state, f"ipykernel {version}", advice)
    if find_spec("anywidget") is None:
        yield Finding("live view", MISSING, "anywidget is not installed", "pip install anywidget; until then tables are shown")


def ipykernel_advice(version: str) -> tuple[str, str]:
    """How well a kernel of this version serves the live view: a state, and what to do."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) == (7, 0):
        return MISSING, "7.0 cannot send from threads, so there is no live view: pip install -U ipykernel"
    if (major, minor) == (7, 4):
        return OK, "7.4 needs our work-around for buttons in a busy kernel; %specdec stop always works"
    if (major, minor) < (6, 29):
        return NOTE, "older than 6.29, which we do not test: pip install -U ipykernel"
    if major < 7:
        return NOTE, "6.x answers buttons only between cells; %specdec stop in the next cell, or an interrupt, works too"
    return OK, ""


def _database(explicit: str | os.PathLike[str] | None) -> Finding:
    places = describe(explicit)
    for folder, short in ((Path.cwd(), ""), (Path(__file__).parents[2], ""), (Path.home(), f"~{os.sep}")):
        places = places.replace(f"{folder}{os.sep}", short)  # what a reader can place, and a notebook may store
    return Finding("database", OK, "; ".join(places.splitlines()))


def _optional() -> Iterable[Finding]:
    for name, use in OPTIONAL.items():
        version = _version(name)
        if version is None:
            yield Finding(name, NOTE, f"not installed; needed only for {use}")
        else:
            yield Finding(name, OK, version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
