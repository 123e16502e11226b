"""Configurations side by side: short blocks, plain decoding always among them, in shuffled and then reversed order.

All blocks of a cell start at the end of the same prompts. At temperature 0 every configuration must emit the tokens of
plain decoding; one that does not is named with the place, and its speed means nothing. A block that the machine disturbed
is measured again, and left out. Not known here: who watches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..engine.cache import CacheTooLarge
from ..records import Cell, Run, SpecConfig, StepRecord, forced_label
from ..stream import Stream
from ..summary import Comparison, compare
from ..workload import Sampling, Workload
from .judges import GRAM, OFF, BlockTimes, Mismatch, TokenGate, repeated_share
from .sessions import Sessions

if TYPE_CHECKING:
    from ..engine.loop import Engine, OpenSession

WARM_UP_SHARE, WARM_UP_ROUNDS = 0.25, 3  # of a block, and at least this many rounds
LOOPING = 0.2  # share of repeated text from which on a reader is told
MIN_BLOCKS = 2  # undisturbed ones; with fewer, all are shown and the reader is told
PROMPTS_READ = "prompts read in"  # the notice that only says how long it took
BASELINE_ADDED = "plain decoding (off) was added: every speed-up is measured against it in the same blocks"


class Profile:
    """The blocks of a profile. Iterate it once: every item is a stream, to be drained before the next is asked for.

    notices     what a reader must know besides the numbers: what was added, what the prompts cost to read
    skipped     cells that could not run, with the reason
    mismatches  configurations that emitted other tokens than plain decoding; their runs carry it as a label
    disturbed   blocks per cell that took far longer than others of the same work, and are left out
    busy        cells in which so many blocks were disturbed that none was left out and no number should be quoted
    """

    def __init__(
        self, cells: tuple[Cell, ...], configs: tuple[SpecConfig, ...], sessions: Sessions, *, blocks: int, block_s: float,
        seed: int, is_gated: bool,
    ) -> None:
        self.cells, self.blocks, self.block_s = cells, blocks, block_s
        self.configs = configs if OFF in configs else (OFF, *configs)
        self.notices: list[str] = [] if OFF in configs else [BASELINE_ADDED]
        self.skipped: dict[Cell, str] = {}
        for cell in cells:
            self._skip(cell, sessions.why_not(cell))
        if len(self.skipped) == len(cells):
            raise ValueError(f"none of these cells can run. {'; '.join(self.notices)}")
        self.mismatches: dict[tuple[Cell, str], Mismatch] = {}
        self.disturbed: dict[Cell, frozenset[int]] = {}
        self.busy: set[Cell] = set()
        self._sessions, self._seed, self._is_gated = sessions, seed, is_gated

    def __iter__(self) -> Iterator[Stream]:
        for cell in (c for c in self.cells if c not in self.skipped):
            try:
                session = self._sessions.open(cell)
            except CacheTooLarge as error:  # memory was free when this profile was made; the other cells go on
                self._skip(cell, str(error))
                continue
            yield from self._cell(cell, session)
            del session
            self._sessions.forget(cell)

    def _skip(self, cell: Cell, reason: str | None) -> None:
        if reason is not None:
            self.skipped[cell] = reason
            self.notices.append(f"{cell} skipped: {reason}")

    def comparisons(self, runs: Sequence[Run]) -> tuple[Comparison, ...]:
        """What may be quoted of these runs: undisturbed blocks, and the tokens of plain decoding."""
        found = compare([run for run in runs if run.header.block not in self.disturbed.get(run.header.cell, ())])
        return tuple(c for c in found if (c.cell, c.config) not in self.mismatches)

    def _cell(self, cell: Cell, session: OpenSession) -> Iterator[Stream]:
        gate, times = TokenGate(cell), BlockTimes()
        prefill_s = [self._warm_up(session, config, gate) for config in self.configs]
        self.notices.append(f"{cell}: {PROMPTS_READ} {sum(prefill_s):.2f} s")
        block = 0
        while block < self.blocks or (block < 2 * self.blocks and block - len(times.disturbed()) < self.blocks):
            for config in self._order(block):
                yield self._block(cell, session, config, block, gate, times)
            block += 1
        self._sum_up(cell, gate, times, block)

    def _sum_up(self, cell: Cell, gate: TokenGate, times: BlockTimes, num_blocks: int) -> None:
        """Say what a reader of the numbers of this cell must know."""
        disturbed, worst = times.disturbed(), max(times.slowdowns().values(), default=1.0)
        if num_blocks - len(disturbed) >= MIN_BLOCKS:
            self.disturbed[cell] = disturbed
            words = f"{len(disturbed)} of {num_blocks} blocks were disturbed and are left out"
            self.notices += [f"{cell}: {words}; the same rounds took up to {worst:.1f} times as long"] if disturbed else []
        elif disturbed:
            self.busy.add(cell)
            words = f"the same rounds took up to {worst:.1f} times as long"
            self.notices.append(f"{cell}: the machine was busy throughout, {words}: quote no number of this cell")
        share = repeated_share(gate.plain)
        if share >= LOOPING:
            self.notices.append(
                f"{cell}: {share:.0%} of the runs of {GRAM} tokens that plain decoding wrote repeat earlier ones: such text is "
                "easy to draft, for ngram above all"
            )

    def _order(self, block: int) -> list[SpecConfig]:
        """Shuffled, then the same order reversed: over two blocks a steady drift of the machine cancels."""
        order = list(self.configs)
        random.Random(f"{self._seed}/{block // 2}").shuffle(order)
        return order[::-1] if block % 2 else order

    def _warm_up(self, session: OpenSession, config: SpecConfig, gate: TokenGate) -> float:
        """First touches, outside of every number; seconds of prefill in it."""
        prefill_s, rows = 0.0, _Rows()
        for step in limited(session.steps(config), WARM_UP_SHARE * self.block_s, WARM_UP_ROUNDS):
            prefill_s += step.wall_s if step.kind == "prefill" else 0.0
            rows.add(step)
        gate.take(config, rows.tokens)
        return prefill_s

    def _block(
        self, cell: Cell, session: OpenSession, config: SpecConfig, block: int, gate: TokenGate, times: BlockTimes
    ) -> Stream:
        source = limited(session.steps(config, block=block), self.block_s)

        def watched() -> Iterator[StepRecord]:
            rows, walls = _Rows(), []
            with source:
                for step in source:
                    rows.add(step)
                    walls.append(step.wall_s)
                    yield step
            times.add(config, block, walls)
            gate.take(config, rows.tokens)
            if forced_label(source.header.labels) is None:  # forced drafts are emitted whatever the target says
                self._judge(cell, gate)
            if (cell, str(config)) in self.mismatches:
                stream.header = replace(stream.header, labels=(*stream.header.labels, "other tokens than plain decoding"))

        stream = Stream(source.header, watched())
        return stream

    def _judge(self, cell: Cell, gate: TokenGate) -> None:
        if not self._is_gated:
            return
        for config in self.configs:
            found = gate.find(config)
            if found is not None:
                self.mismatches.setdefault((cell, str(config)), found)


def profile(
    engine: Engine, cells: Sequence[Cell | str], configs: Sequence[SpecConfig | str], *,
    workload: str | Callable[[Cell], Workload] = "prose", blocks: int = 4, block_s: float = 0.5, max_new_tokens: int = 512,
    sampling: Sampling | None = None,
) -> Profile:
    """Every configuration in every cell against plain decoding, as streams to drain: LiveRun(profile(...)), record(...).

    workload  a kind of shipped held-out text, or a function from cell to Workload
    blocks    undisturbed ones that are wanted; at most twice as many are measured
    block_s   engine seconds of one stream; it also ends when rows finish
    raises    UnsupportedConfig for a configuration that this engine cannot run, ValueError when no cell can run; both
              before anything is measured
    """
    if not cells or not configs:
        raise ValueError(f"a profile needs at least one cell and one configuration, got {len(cells)} and {len(configs)}")
    if blocks < 1 or not block_s > 0:
        raise ValueError(f"a profile needs at least 1 block of more than 0 s, got {blocks} of {block_s} s")
    chosen = tuple(dict.fromkeys(c if isinstance(c, SpecConfig) else SpecConfig.parse(c) for c in configs))
    check_configs(engine, chosen)
    sampling = sampling or {}
    return Profile(
        tuple(dict.fromkeys(c if isinstance(c, Cell) else Cell.parse(c) for c in cells)), chosen,
        Sessions(engine, workload, max_new_tokens=max_new_tokens, sampling=sampling), blocks=blocks, block_s=block_s,
        seed=sampling.get("seed", 0),
        is_gated=sampling.get("temperature", 0.0) == 0 or sampling.get("verifier") == "coupled",
    )


def check_configs(engine: Engine, configs: Sequence[SpecConfig]) -> None:
    """Raise UnsupportedConfig now for what this engine cannot run, rather than in the middle of a measurement."""
    session = engine.open(Workload("check", ((0,),), 1))
    for config in configs:
        session.steps(config)


def limited(stream: Stream, seconds: float, min_rounds: int = 1) -> Stream:
    """The stream up to `seconds` of measured round time; prefills do not count."""

    def steps() -> Iterator[StepRecord]:
        spent_s, rounds = 0.0, 0
        with stream:
            for step in stream:
                yield step
                if step.kind == "round":
                    spent_s, rounds = spent_s + step.wall_s, rounds + 1
                    if rounds >= min_rounds and spent_s >= seconds:
                        return

    return Stream(stream.header, steps())


class _Rows:
    """New tokens per row, collected step by step."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def add(self, step: StepRecord) -> None:
        self.tokens = self.tokens or [[] for _ in range(step.batch)]
        for row, emitted in zip(self.tokens, step.tokens, strict=True):
            row.extend(emitted)

