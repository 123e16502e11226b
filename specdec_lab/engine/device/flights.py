"""Flights: rounds given to the device and not read yet, and how many more may be given.

A flight is no longer than rows certainly need, and none goes beyond a point where the host must act between two rounds.
Not known here: what a round does, records.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ...records import SpecConfig
from .graphs import Player
from .program import Program
from .readings import Letter

ROUNDS_PER_READ = 8
FLIGHTS = 2  # at once: one runs while the other is read


@dataclass(frozen=True, slots=True)
class Flight:
    """Rounds given to the device and not read yet.

    first   number of its first round on the device
    rounds  how many
    waited_ns  host time from the request to the first of them: what the engine cost where the device had run dry
    """

    config: SpecConfig
    program: Program
    player: Player
    first: int
    rounds: int
    letter: Letter
    waited_ns: int


def certain_rounds(tokens: int, config: SpecConfig, under_way: Collection[Flight], most: int) -> int:
    """Rounds that certainly begin before some row has committed `tokens` more, beyond those under way.

    However much they accept: a round commits at most a token more than its depth. At most `most`; at least 1 if none is
    under way.
    """
    taken = sum(flight.rounds * (flight.config.depth + 1) for flight in under_way)
    rounds = -(-(tokens - taken) // (config.depth + 1))
    return min(max(rounds, 0 if under_way else 1), most)
