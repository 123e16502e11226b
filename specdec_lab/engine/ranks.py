"""One rank leads: what its engines do to their sessions, the other ranks do to theirs, in the same order.

So one process alone looks at the clock, asks policies, reads files and writes them, and a measurement knows nothing of ranks:
whatever ends a run early or chooses among configurations, the others learn what to do next, from host to host. Where all ranks
run one program instead, as a script under torchrun may, nobody leads; then a choice that is not fixed is the first rank's
(OpenSession). Not known here: what is measured.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..records import SpecConfig, StepRecord
from ..workload import Workload
from .cache import CacheTooLarge
from .loop import Engine, EngineSettings
from .models.groups import Processes
from .models.loading import ModelPair
from .models.meeting import meeting
from .session import Session


@dataclass(frozen=True, slots=True)
class Order:
    """What to do to session `number`; `dropped` are those that nobody uses any more."""

    verb: str
    number: int = 0
    config: SpecConfig | None = None
    opening: tuple[EngineSettings, Workload] | None = None
    dropped: tuple[int, ...] = ()


class Orders:
    """Those of the leader, given to all before it does the same."""

    def __init__(self, group: Processes) -> None:
        self._group, self._opened = group, 0
        self._dropped: deque[int] = deque()  # filled whenever memory is cleared, so sent with the next order

    def give(self, verb: str, number: int = 0, config: SpecConfig | None = None) -> None:
        """Let all ranks do this next."""
        self._send(Order(verb, number, config))

    def open(self, settings: EngineSettings, workload: Workload, make: Callable[[], Session]) -> LeadingSession:
        """A session on every rank; CacheTooLarge where one of them has no room for it."""
        self._opened += 1
        self._send(Order("open", self._opened, opening=(settings, workload)))
        made = LeadingSession(_made_by_all(self._group, make), self, self._opened)
        weakref.finalize(made, self._dropped.append, self._opened)
        return made

    def _send(self, order: Order) -> None:
        dropped = tuple(self._dropped.popleft() for _ in range(len(self._dropped)))
        self._group.tell(Order(order.verb, order.number, order.config, order.opening, dropped))


class LeadingSession:
    """A session of the leader, with the face of Session; whatever meets other ranks is ordered first."""

    def __init__(self, session: Session, orders: Orders, number: int) -> None:
        self._inner, self._orders, self._number = session, orders, number

    @property
    def live(self) -> int:
        """See Session.live."""
        return self._inner.live

    @property
    def mean_length(self) -> float:
        """See Session.mean_length."""
        return self._inner.mean_length

    @property
    def capture_s(self) -> float:
        """See Session.capture_s."""
        return self._inner.capture_s

    def check(self, config: SpecConfig) -> None:
        """See Session.check."""
        self._inner.check(config)

    def rewind(self) -> None:
        """See Session.rewind."""
        self._orders.give("rewind", self._number)
        self._inner.rewind()

    def turns(self) -> Iterator[None]:
        """See Session.turns."""
        self._orders.give("turns", self._number)
        turns = self._inner.turns()
        while True:
            self._orders.give("turn", self._number)
            if next(turns, self) is self:
                return
            yield

    def prefill(self, config: SpecConfig | None) -> StepRecord | None:
        """See Session.prefill."""
        self._orders.give("prefill", self._number, config)
        return self._inner.prefill(config)

    def round(self, config: SpecConfig) -> StepRecord:
        """See Session.round."""
        self._orders.give("round", self._number, config)
        return self._inner.round(config)


@dataclass(slots=True)
class _Follower:
    """The sessions of a rank that follows, by number."""

    pair: ModelPair
    group: Processes
    engines: dict[EngineSettings, Engine] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    turns: dict[int, Iterator[None]] = field(default_factory=dict)

    def obey(self, order: Order) -> None:
        for number in order.dropped:
            self.sessions.pop(number, None)
            self.turns.pop(number, None)
        if order.opening is not None:
            self._open(order.number, *order.opening)
            return
        session, config = self.sessions[order.number], order.config
        if order.verb == "rewind":
            session.rewind()
        elif order.verb == "turns":
            self.turns[order.number] = session.turns()
        elif order.verb == "turn":
            next(self.turns[order.number], None)
        elif order.verb == "prefill":
            session.prefill(config)
        else:
            assert config is not None
            session.round(config)

    def _open(self, number: int, settings: EngineSettings, workload: Workload) -> None:
        if settings not in self.engines:
            self.engines[settings] = Engine.of(self.pair, settings)
        engine = self.engines[settings]
        try:
            self.sessions[number] = _made_by_all(self.group, lambda: engine.session(workload))
        except CacheTooLarge:  # the leader says so, and goes on without it
            return


def lead(pair: ModelPair) -> None:
    """From now on what engines over this pair do is done by the other ranks too, which must `follow`."""
    group = pair.target.group
    if not isinstance(group, Processes) or group.orders is not None:
        return
    orders = group.orders = Orders(group)
    if (here := meeting()) is not None:
        here.before_leaving(lambda: orders.give("done"))


def follow(pair: ModelPair) -> None:
    """Do what the leader's engines do, until it leaves."""
    group = pair.target.group
    assert isinstance(group, Processes)  # whoever follows is one of several ranks
    follower = _Follower(pair, group)
    while True:
        order = group.tell()
        if order.verb == "done":
            return
        follower.obey(order)


def _made_by_all(group: Processes, make: Callable[[], Session]) -> Session:
    """What `make` gives if all ranks could make theirs; else CacheTooLarge with the words of those that could not."""
    made, reason = None, ""
    try:
        made = make()
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())
    reasons = {words: rank for rank, words in reversed([*enumerate(group.hear_all(reason))]) if words}
    if made is None or reasons:
        raise CacheTooLarge("; ".join(f"rank {rank}: {words}" for words, rank in reasons.items()))
    return made
