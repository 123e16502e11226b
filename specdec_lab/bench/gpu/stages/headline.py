"""`headline`: speed-up against batch at several lengths, as MagicDec draws it, on a model of random weights.

Times are measured, acceptance is forced, and every row and the picture say so. A round is worth the tokens that the forced
chance gives on average (few rounds at batch 1 would scatter around it); what these rounds gave stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean, median

from ....costs import omega
from ....engine.loop import Engine
from ....records import Cell, SpecConfig
from ....summary import paired_ratio
from ....view.panels import Panel, Picture, Points
from ....view.panels_svg import picture_svg
from ..attempts import one_by_one
from ..context import Context
from ..ledger import Row
from ..models import engine_for, fitting, opened, rounds_of, tokens_for

OFF = SpecConfig.off()
BLOCKS = 3
FILE = "gpu_headline.svg"
Found = Mapping[Cell, Row]


def stage(context: Context) -> Iterator[Row]:
    """A row per cell; the picture when all are there, or when time is over."""
    model, found = context.sizes.models[0], {}
    engine = engine_for(context, model, forced=context.sizes.alpha)
    try:
        for length in context.sizes.headline:
            for batch in context.sizes.batches:
                context.checkpoint(f"{batch}x{length}")
                wanted = Cell(batch, length)
                for row in one_by_one(context, f"{model.name} {wanted}", _cell(context, engine, model.name, wanted)):
                    if row.kind == "headline":
                        found[wanted] = row
                    yield row
    finally:
        if found:
            path = context.folder / FILE
            path.write_text(picture_svg(picture(context, model.name, found)))
            context.say(f"written: {path}")


def _cell(context: Context, engine: Engine, name: str, cell: Cell) -> Iterator[Row]:
    config, rounds = context.sizes.config, max(2, context.sizes.rounds // 2)
    fits, note = fitting(context, engine, cell, tokens_for(config, rounds))
    if note is not None or fits is None:
        yield note or Row("left out", str(cell))
        return
    session = opened(engine, cell, tokens_for(config, rounds))
    if isinstance(session, Row):
        yield session
        return
    walls: dict[SpecConfig, list[float]] = {OFF: [], config: []}
    drafts: list[float] = []
    verifies: list[float] = []
    seen: list[int] = []
    labels: tuple[str, ...] = ()
    for block in range(BLOCKS):
        for which in (OFF, config) if block % 2 == 0 else (config, OFF):
            run = rounds_of(session, which, max(1, rounds // BLOCKS), block=block)
            walls[which].append(median(step.wall_s for step in run.rounds))
            labels = run.header.labels
            if which == config:
                drafts += [step.draft_s / config.depth for step in run.rounds]
                verifies += [step.verify_s for step in run.rounds]
                seen += [n + 1 for step in run.rounds for n, on in zip(step.accepted, step.live, strict=True) if on]
    tokens = omega(config.depth, context.sizes.alpha)
    ratio = paired_ratio([wall * tokens for wall in walls[OFF]], walls[config])  # of times for the same tokens
    plain = median(walls[OFF])
    yield Row("headline", f"{name} {cell}", {
        "speedup": 1 / ratio.mean, "low": 1 / ratio.high, "high": 1 / ratio.low, "plain_s": plain,
        "round_s": median(walls[config]), "draft_over_plain": median(drafts) / plain,
        "verify_over_plain": median(verifies) / plain, "tokens_per_round": tokens, "tokens_seen": fmean(seen),
        "alpha": context.sizes.alpha,
    }, labels=labels, reason=str(config))  # fmt: skip


def picture(context: Context, name: str, found: Found) -> Picture:
    """T_D/T_T, T_V/T_T and the speed-up against batch, one series per length."""
    ticks = tuple(float(batch) for batch in sorted({cell.batch for cell in found}))
    lengths = sorted({cell.length for cell in found})
    config, alpha = context.sizes.config, context.sizes.alpha

    def series(value: str, low: str, high: str) -> tuple[Points, ...]:
        return tuple(_points(found, length, style, (value, low, high)) for style, length in enumerate(lengths))

    ratios = [("T_D / T_T", "plain steps per drafted token", "draft_over_plain"),
              ("T_V / T_T", "plain steps per verify forward", "verify_over_plain")]
    panels = [Panel(title, "batch", label, "context", ticks, series(key, key, key)) for title, label, key in ratios]
    panels.append(Panel("speed-up", "batch", "times plain decoding", "context", ticks, series("speedup", "low", "high"),
                        reference=(1.0, "1x")))
    labels = ", ".join(dict.fromkeys(label for row in found.values() for label in (*context.ledger.labels, *row.labels)))
    notes = (f"Times measured, acceptance {alpha:g} per token forced: {labels}.", f"{context.ledger.header['device']}, commit "
             f"{context.ledger.header['commit'][:12]}")
    return Picture("gpu_headline", f"{name}, {config}, acceptance forced to {alpha:g}", notes, tuple(panels), 3)


def _points(found: Found, length: int, style: int, names: Iterable[str]) -> Points:
    chosen = sorted(cell for cell in found if cell.length == length)
    y, low, high = (tuple(float(found[cell].values[name]) for cell in chosen) for name in names)
    x = tuple(float(cell.batch) for cell in chosen)
    return Points(f"{length:,}", style, x, y, low, high, (False,) * len(x), joined=True)
