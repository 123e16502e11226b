"""`rounds`: plain steps, drafts, verification and whole rounds of models of random weights, as shares of the physical limit.

Plain decoding and speculation run interleaved on one engine. Floors come from calibrated ceilings: weights and KV that must be
read, or FLOPs, whichever takes longer. S / S_ideal is what is left when acceptance is taken out of a speed-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

from ....costs import Limits, forward_floor
from ....engine.loop import Engine, OpenSession
from ....records import Cell, Run, SpecConfig
from ....sensors import Absent, joules_per_token
from ..attempts import one_by_one
from ..context import Context
from ..ledger import Row, bar_verdict
from ..models import LABELS, assumed, engine_for, fitting, opened, rounds_of, tokens_for, tokens_in
from ..sizes import ModelCells

BLOCKS = 2  # of plain, speculating, speculating, plain
KV_BOUND = 0.7  # share of KV in plain decoding from which on S / S_ideal has a bar
OFF = SpecConfig.off()
PROFILER_AGREES = 0.02
MAIN_KERNELS, COMBINE_KERNEL = ("split_kernel", "list_kernel"), "combine_kernel"  # one of the first per layer


def stage(context: Context) -> Iterator[Row]:
    """A row per model and cell, then a row per bar; and for a check the attention that the profiler saw."""
    for model in context.sizes.models:
        context.checkpoint(model.name)
        yield from one_by_one(context, model.name, _model(context, model))


def _model(context: Context, model: ModelCells) -> Iterator[Row]:
    engine = engine_for(context, model)
    yield Row("model", model.name, {
        "parameters": model.shape.params, "weight_bytes": model.shape.weight_bytes(engine.pair.target.dtype.itemsize),
        "kv_bytes_per_token": model.shape.kv_bytes_per_token(engine.pair.target.kv_dtype.itemsize),
    }, labels=LABELS, reason=f"attention by {engine.backend.name}, rounds {engine.rounds.spelled or engine.rounds.mode}")
    for cell in model.cells:
        context.checkpoint(f"{model.name} {cell}")
        yield from one_by_one(context, f"{model.name} {cell}", _cell(context, engine, model, cell))
    yield from one_by_one(context, f"{model.name} under the profiler", _profiled(context, engine, model))


def _cell(context: Context, engine: Engine, model: ModelCells, wanted: Cell) -> Iterator[Row]:
    config, rounds = context.sizes.config, context.sizes.rounds
    new_tokens = tokens_for(config, rounds)
    cell, note = fitting(context, engine, wanted, new_tokens)
    if note is not None:
        yield note
    if cell is None:
        return
    session = opened(engine, cell, new_tokens)
    if isinstance(session, Row):
        yield session
        return
    runs: dict[SpecConfig, list[Run]] = {OFF: [], config: []}
    with context.watched() as seen:
        for block in range(BLOCKS):
            for which in (OFF, config, config, OFF):
                runs[which].append(rounds_of(session, which, rounds // (2 * BLOCKS) or 1, block=block))
    energy = {**_energy(context, session, OFF, "plain"), **_energy(context, session, config, "spec")}
    told = {**energy, "capture_s": session.capture_s}
    yield from _rows(context, model, cell, runs, seen.flags, told, is_wanted=cell == wanted)


def _rows(
    context: Context, model: ModelCells, cell: Cell, runs: dict[SpecConfig, list[Run]], flags: tuple[str, ...],
    told: dict[str, object], *, is_wanted: bool,
) -> Iterator[Row]:  # fmt: skip
    config = context.sizes.config
    found = measured(runs, config)
    limits = Limits(context.ceilings.read_bytes_per_s, context.ceilings.gemm_flops_per_s)
    floors = floors_of(model, limits, cell, config, runs[config][0].header.target["kv_dtype"])
    etas = {
        "eta_plain": floors["plain_s"] / found["plain_s"], "eta_draft": floors["draft_s"] / found["draft_s"],
        "eta_verify": floors["verify_s"] / found["verify_s"], "eta_round": floors["round_s"] / found["round_s"],
    }  # fmt: skip
    ideal = etas["eta_round"] / etas["eta_plain"]
    what = f"{model.name} {cell}"
    values = {**found, **etas, "s_over_ideal": ideal, "kv_share": floors["kv_share"], **told}
    values |= {f"floor_{name}": value for name, value in floors.items() if name != "kv_share"}
    labels = runs[config][0].header.labels
    yield Row("rounds", what, values, labels=labels, flags=flags, reason=f"{config}, {BLOCKS} blocks")
    if model is context.sizes.models[-1] and is_wanted:
        yield from _bars(context, cell, what, etas, ideal, floors["kv_share"], labels)


def _profiled(context: Context, engine: Engine, model: ModelCells) -> Iterator[Row]:
    """Attention per plain step by the profiler's count of its kernels, beside what our own stamps say, in the smallest cell."""
    if not context.is_gpu:
        return
    from torch.profiler import ProfilerActivity, profile

    context.checkpoint(f"{model.name} under the profiler")
    rounds = context.sizes.rounds // 4
    session = assumed(engine, model.cells[0], 2 * tokens_for(OFF, rounds))
    ours = rounds_of(session, OFF, rounds)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        rounds_of(session, OFF, rounds)
        context.synchronize()
    theirs = attention_in(seen.key_averages(), model.shape.layers)
    mine = median(step.attention_s for step in ours.rounds)
    apart = abs(theirs / mine - 1) if mine else float("inf")
    what = f"{model.name} {model.cells[0]}"
    yield Row("profiler", what, {"apart": apart, "profiled_attention_s": theirs, "stamped_attention_s": mine},
              bar_verdict(-apart, -PROFILER_AGREES), f"within {PROFILER_AGREES:.0%} of our stamps", labels=ours.header.labels)


def attention_in(events: Iterable[Any], layers: int) -> float:
    """Seconds per forward that a profiler's averages book under the kernels of tree attention; inf if it saw none.

    Forwards are counted by its own number of launches: rounds that ran ahead and were not read are in it too.
    """
    seen = [event for event in events if event.key.startswith((*MAIN_KERNELS, COMBINE_KERNEL))]
    forwards = sum(event.count for event in seen if event.key.startswith(MAIN_KERNELS)) / layers
    return 1e-6 * sum(float(event.self_device_time_total) for event in seen) / forwards if forwards else float("inf")


def measured(runs: dict[SpecConfig, list[Run]], config: SpecConfig) -> dict[str, float]:
    """Medians over all rounds of a kind: a plain step; a round, its verification, one drafted token."""
    plain = [step for run in runs[OFF] for step in run.rounds]
    rounds = [step for run in runs[config] for step in run.rounds]
    return {
        "plain_s": median(step.wall_s for step in plain), "round_s": median(step.wall_s for step in rounds),
        "draft_s": median(step.draft_s for step in rounds) / config.depth, "verify_s": median(step.verify_s for step in rounds),
        "rest_s": median(step.accept_s + step.commit_s + step.host_s for step in rounds),
        "plain_rounds": len(plain), "spec_rounds": len(rounds),
    }  # fmt: skip


def floors_of(model: ModelCells, limits: Limits, cell: Cell, config: SpecConfig, kv_dtype: str) -> dict[str, float]:
    """What these forwards take at the ceilings."""
    size = 2 if kv_dtype.endswith("16") else 4
    window = config.view.max_tokens if config.view else None
    seen = cell.length if window is None else min(cell.length, window)
    plain = forward_floor(model.shape, limits, cell.batch, 1, cell.length, size)
    draft = forward_floor(model.shape, limits, cell.batch, 1, seen, size).total_s
    verify = forward_floor(model.shape, limits, cell.batch, config.depth + 1, cell.length, size).total_s
    return {
        "plain_s": plain.total_s, "draft_s": draft, "verify_s": verify, "round_s": config.depth * draft + verify,
        "kv_share": plain.kv_s / plain.total_s,
    }  # fmt: skip


def _energy(context: Context, session: OpenSession, config: SpecConfig, name: str) -> dict[str, object]:
    """Joules per token and mean power over a stretch of nothing else; where the machine does not tell, why."""
    with context.watched() as seen:
        tokens = tokens_in(session, config, context.sizes.energy_s, context.now)
    found = {f"{name}_power_w": seen.conditions.power_w, f"{name}_token_j": joules_per_token(seen.conditions, tokens)}
    return {key: str(value) if isinstance(value, Absent) else value for key, value in found.items()}


def _bars(
    context: Context, cell: Cell, what: str, etas: dict[str, float], ideal: float, kv_share: float, labels: tuple[str, ...]
) -> Iterator[Row]:
    sizes = context.sizes
    for at, plain, verify in sizes.etas:
        if at != cell:
            continue
        asked = [("eta_plain", plain), ("eta_draft", sizes.draft_eta)] + ([("eta_verify", verify)] if verify else [])
        for name, least in asked:
            yield Row(name, what, {name: etas[name]}, bar_verdict(etas[name], least), f"at least {least:.2f}", labels=labels)
    if kv_share >= KV_BOUND:
        yield Row("S/S_ideal", what, {"s_over_ideal": ideal}, bar_verdict(ideal, sizes.ideal), f"at least {sizes.ideal:.2f}",
                  labels=labels)
