"""The race: per cell read the prompts, check the tokens, then decode in interleaved blocks; hand out the cell when it is done.

Every block runs every peer once, in shuffled order, and the next block runs that order backwards, so that a steady drift of
the machine cancels. Peers that disturb others are loaded after them and measured in blocks of their own beside our peers.
Not known here: which engines take part, where results are kept.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ... import sensors
from ...records import Cell
from ...summary import PairedRatio, paired_ratio
from ..judges import GRAM, BlockTimes, repeated_share
from ..profile import LOOPING, MIN_BLOCKS
from ..sessions import Sessions
from .gate import EQUAL, Gate, Judge, Verdict
from .ours import GROUP, PLAIN
from .peer import Decoded, Peer, PeerFailed, Rows
from .rows import ETA_ABOVE, CellResult, Conditions, Row

SETTLE_S = 0.02  # before every decode: threads of the previous peer spin for some milliseconds before they sleep
BUSY_RATIO, BUSY_SLACK_S = 1.1, 5e-4  # wall over CPU seconds of the driving thread, as in the engine's records


@dataclass(slots=True)
class Lane:
    """A peer on its way through one cell."""

    peer: Peer
    state: str = "ok"
    words: str = ""
    verdict: Verdict = EQUAL
    prefill_s: float | None = None
    decoded: dict[int, Decoded] = field(default_factory=dict)  # by block
    times: BlockTimes = field(default_factory=BlockTimes)

    @property
    def name(self) -> str:
        """What its row is called."""
        return self.peer.name

    @property
    def is_ours(self) -> bool:
        """Whether it is a configuration of our engine, which must give the very tokens of plain decoding."""
        return self.name.startswith(f"{GROUP}/")

    @property
    def is_running(self) -> bool:
        """Whether it is still worth a block."""
        return self.state in ("ok", "near-tie")

    def judge(self, gate: Gate, decoded: Decoded) -> None:
        """Keep the worst verdict of all runs."""
        verdict = gate.judge(decoded.tokens, is_ours=self.is_ours)
        if verdict.state != "equal" and not self.verdict.is_red:
            self.verdict, self.state, self.words = verdict, verdict.state, verdict.words

    def take(self, block: int, decoded: Decoded) -> None:
        """A measured block."""
        self.decoded[block] = decoded
        self.times.add(self.name, block, [decoded.seconds])

    def stop(self, state: str, words: str) -> None:
        """It cannot go on; what was measured stays."""
        self.state, self.words = state, words

    @property
    def undisturbed(self) -> list[int]:
        """Blocks that took about as long as the fastest."""
        return [block for block in self.decoded if block not in self.times.disturbed()]

    @property
    def used(self) -> list[int]:
        """Blocks that numbers rest on: the undisturbed ones, or all where too few of them are left."""
        return self.undisturbed if len(self.undisturbed) >= min(MIN_BLOCKS, len(self.decoded)) else list(self.decoded)

    def per_s(self, block: int) -> float:
        """Tokens per second of a block, all rows together."""
        decoded = self.decoded[block]
        return sum(map(len, decoded.tokens)) / decoded.seconds

    def median(self, name: str) -> float | None:
        """Median over the used blocks of what the peer told besides; None if it did not tell."""
        values = [self.decoded[b].extra[name] for b in self.used if self.decoded[b].extra.get(name) is not None]
        return float(statistics.median(values)) if values else None

    @property
    def eta(self) -> float | None:
        """Floor (modelled) over measured time, median over the used blocks; None where the peer tells no floor."""
        told = [(self.decoded[b].extra.get("floor_s"), self.decoded[b].seconds) for b in self.used]
        shares = [floor_s / seconds for floor_s, seconds in told if floor_s is not None]
        return statistics.median(shares) if shares else None


class Race:
    """Peers over cells. Use as a context, which closes the peers, and iterate `run(cells)`.

    peers     plain decoding of our engine must be the first
    sessions  gives the prompts of a cell, and says why a cell cannot run
    judge     decides between two tokens where engines differ
    blocks    undisturbed ones that are wanted; at most twice as many are measured
    say       takes lines about what happened; show takes lines about what is happening
    """

    def __init__(
        self, peers: Sequence[Peer], sessions: Sessions, judge: Judge, *, blocks: int = 5, new_tokens: int = 32, seed: int = 0,
        say: Callable[[str], None] = lambda line: None, show: Callable[[str], None] = lambda line: None,
        settle_s: float = SETTLE_S,
    ) -> None:
        if not peers or peers[0].name != PLAIN:
            raise ValueError(f"the first peer of a race is {PLAIN}, got {peers[0].name if peers else 'none'}")
        if blocks < 1 or new_tokens < 1:
            raise ValueError(f"a race needs at least 1 block and 1 new token, got {blocks} and {new_tokens}")
        self.peers, self.blocks, self.new_tokens, self.seed = tuple(peers), blocks, new_tokens, seed
        self._sessions, self._judge, self._say, self._show, self._settle_s = sessions, judge, say, show, settle_s

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.peers:
            peer.close()

    def run(self, cells: Sequence[Cell]) -> Iterator[CellResult]:
        """The cells one by one; whoever takes a result has it for good."""
        for cell in dict.fromkeys(cells):
            reason = self._sessions.why_not(cell)
            if reason is not None:
                self._say(f"{cell} skipped: {reason}")
                yield CellResult(cell, (), skipped=reason)
            else:
                yield self._cell(cell)

    def _cell(self, cell: Cell) -> CellResult:
        load_before = _load()
        workload = self._sessions.workload(cell)
        prompts: Rows = [list(prompt) for prompt in workload.prompts]
        lanes = [Lane(peer) for peer in self.peers]
        plain = lanes[0]
        gate = self._start(cell, plain, prompts)
        if gate is None:
            return CellResult(cell, (), skipped=f"{PLAIN}: {plain.words}")
        early = [lane for lane in lanes if not lane.peer.goes_last]
        for lane in early[1:]:
            self._enter(cell, lane, prompts, gate)
        self._blocks(cell, early, (), 0, gate)
        late = [lane for lane in lanes if lane.peer.goes_last]
        for lane in late:
            self._enter(cell, lane, prompts, gate)
        if any(lane.is_running for lane in late):
            first = max(plain.decoded, default=-1) + 1
            self._blocks(cell, [lane for lane in early if lane.is_ours], late, first, gate)
        for lane in late:
            lane.peer.close()
        if gate.plain_verdict.is_red:
            for lane in (lane for lane in early if lane.is_ours and lane.is_running):
                lane.verdict = gate.plain_verdict
                lane.stop("red", gate.plain_verdict.words)
        return self._result(cell, lanes, gate, workload.labels, load_before)

    def _start(self, cell: Cell, plain: Lane, prompts: Rows) -> Gate | None:
        """The gate, made of what plain decoding emits; None where that cannot run."""
        try:
            plain.prefill_s = plain.peer.prepare(prompts, self.new_tokens)
            decoded = plain.peer.decode()
        except PeerFailed as reason:
            plain.stop("failed", str(reason))
            self._say(f"{cell} skipped: {reason}")
            return None
        self._say(f"{cell} {PLAIN}: prompts read in {plain.prefill_s:.2f} s")
        return Gate(prompts, decoded.tokens, self._judge)

    def _enter(self, cell: Cell, lane: Lane, prompts: Rows, gate: Gate) -> None:
        """Read the prompts and check the tokens, which is the warm-up too. Nothing is timed before."""
        reason = lane.peer.why_not(cell)
        if reason is not None:
            lane.stop("skipped", reason)
        else:
            try:
                lane.prefill_s = lane.peer.prepare(prompts, self.new_tokens)
                lane.judge(gate, lane.peer.decode())
            except PeerFailed as failure:
                lane.stop("failed", str(failure))
        found = lane.words or "the tokens of plain decoding"
        self._say(f"{cell} {lane.name}: {'' if lane.state == 'ok' else f'{lane.state}: '}{found}")

    def _blocks(self, cell: Cell, lanes: Sequence[Lane], last: Sequence[Lane], first: int, gate: Gate) -> None:
        """Blocks of all running lanes, `last` at the end of each, until enough of them are undisturbed."""
        for number in range(2 * self.blocks):
            running = [lane for lane in (*lanes, *last) if lane.is_running]
            wanting = [lane for lane in running if sum(block >= first for block in lane.undisturbed) < self.blocks]
            if not wanting:
                return
            for lane in (*self._order(lanes, first + number), *last):
                if lane.is_running:
                    self._show(f"{cell}: block {number + 1}, {lane.name}")
                    self._measure(lane, first + number, gate)

    def _order(self, lanes: Sequence[Lane], block: int) -> list[Lane]:
        """Shuffled, then the same order reversed."""
        order = list(lanes)
        random.Random(f"{self.seed}/{block // 2}").shuffle(order)
        return order[::-1] if block % 2 else order

    def _measure(self, lane: Lane, block: int, gate: Gate) -> None:
        time.sleep(self._settle_s)
        try:
            decoded = lane.peer.decode()
        except PeerFailed as failure:
            lane.stop("failed", str(failure))
            return
        lane.judge(gate, decoded)
        if not lane.verdict.is_red:
            lane.take(block, decoded)

    def _result(
        self, cell: Cell, lanes: Sequence[Lane], gate: Gate, workload_labels: Sequence[str], load_before: float | None
    ) -> CellResult:
        rivals = [lane for lane in lanes if lane.is_ours and lane.is_running and lane.decoded]
        best = max(rivals, key=_median_speed, default=None)
        ours = {lane.name: lane for lane in (lanes[0], best) if lane is not None and lane in rivals}
        load_after = _load()
        labels = (*workload_labels, *lanes[0].peer.settings().get("labels", ()))
        rows = tuple(
            _row(cell, lane, ours, tuple(dict.fromkeys(labels)), load_before, load_after) for lane in lanes
        )  # fmt: skip
        return CellResult(cell, rows, best.name if best is not None else None, tuple(_notices(cell, rows, gate)))


def _row(
    cell: Cell, lane: Lane, ours: Mapping[str, Lane], labels: tuple[str, ...], load_before: float | None,
    load_after: float | None,
) -> Row:  # fmt: skip
    is_timed = lane.state != "red" and bool(lane.decoded)  # a peer that died keeps the blocks that it finished
    eta = lane.eta if is_timed else None
    cached = ("faster than memory can deliver: the data came from a cache",) if eta is not None and eta > ETA_ABOVE else ()
    return Row(
        cell, lane.name, lane.state, lane.words, lane.verdict.to_dict(), _conditions(lane, load_before, load_after),
        settings=lane.peer.settings() if lane.state != "skipped" else {}, prefill_s=lane.prefill_s,
        tokens_per_s={b: lane.per_s(b) for b in lane.decoded} if is_timed else {},
        used_blocks=tuple(lane.used) if is_timed else (), eta=eta,
        tokens_per_round=lane.median("tokens_per_round") if is_timed else None,
        ratios=_ratios(lane, ours) if is_timed else {}, extra=_last_extra(lane) if is_timed else {},
        labels=(*labels, *cached),
    )  # fmt: skip


def _last_extra(lane: Lane) -> dict[str, Any]:
    extra = lane.decoded[max(lane.decoded)].extra
    return {name: value for name, value in extra.items() if name not in ("cpu_s", "floor_s", "tokens_per_round")}


def _ratios(lane: Lane, ours: Mapping[str, Lane]) -> dict[str, PairedRatio]:
    """Our speed over this lane's, over the blocks that count for both."""
    found = {}
    for name, mine in ours.items():
        shared = [block for block in mine.used if block in lane.used]
        if mine is not lane and shared:
            found[name] = paired_ratio([lane.per_s(b) for b in shared], [mine.per_s(b) for b in shared])
    return found


def _conditions(lane: Lane, load_before: float | None, load_after: float | None) -> Conditions:
    disturbed = sorted(lane.times.disturbed()) if lane.decoded else []
    waiting = [block for block, decoded in lane.decoded.items() if _waited(decoded)]
    too_few = bool(disturbed) and len(lane.undisturbed) < MIN_BLOCKS
    is_busy = too_few or 2 * len(waiting) > len(lane.decoded) > 0
    return Conditions(load_before, load_after, tuple(disturbed), tuple(waiting), is_busy)


def _waited(decoded: Decoded) -> bool:
    cpu_s: Any = decoded.extra.get("cpu_s")
    return cpu_s is not None and decoded.seconds > BUSY_RATIO * cpu_s + BUSY_SLACK_S


def _notices(cell: Cell, rows: Sequence[Row], gate: Gate) -> Iterator[str]:
    share = repeated_share(gate.plain)
    if share >= LOOPING:
        runs = f"{share:.0%} of the runs of {GRAM} tokens that plain decoding wrote"
        yield f"{cell}: {runs} repeat earlier ones, which is easy to draft"
    busy = [row.peer for row in rows if row.conditions.is_busy]
    if busy:
        yield f"{cell}: the machine was busy during {', '.join(busy)}: quote no number of these"


def _median_speed(lane: Lane) -> float:
    return statistics.median(lane.per_s(block) for block in lane.used)


def _load() -> float | None:
    load = sensors.load_average()
    return None if isinstance(load, sensors.Absent) else load
