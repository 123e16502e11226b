"""Peers, prompts and a worker script for tests of the race: what they emit and how long that took is given, not measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdec_lab.bench.race.peer import Decoded, PeerFailed
from specdec_lab.bench.race.runner import Race
from specdec_lab.records import Cell
from specdec_lab.workload import Workload

RIGHT = [[1, 2, 3, 4], [5, 6, 7, 8]]
CELL = Cell(2, 3)


@dataclass
class Fake:
    """A peer that emits `tokens` in `seconds`; each may be a list, one entry per decode, the last of which repeats."""

    name: str
    tokens: Any = field(default_factory=lambda: [RIGHT])
    seconds: Any = (1.0,)
    log: list[tuple[str, str]] = field(default_factory=list)
    goes_last: bool = False
    reason: str | None = None
    dies_at: int | None = None  # the decode that fails
    on_decode: Any = None
    extra: dict[str, Any] = field(default_factory=dict)
    num_decodes: int = 0

    def why_not(self, cell: Cell) -> str | None:
        return self.reason

    def settings(self) -> dict[str, Any]:
        return {"threads": 1}

    def prepare(self, prompts: list[list[int]], new_tokens: int) -> float:
        self.log.append((self.name, "prepare"))
        return 0.5

    def decode(self) -> Decoded:
        self.log.append((self.name, "decode"))
        turn, self.num_decodes = self.num_decodes, self.num_decodes + 1
        if self.on_decode is not None:
            self.on_decode(self)
        if turn == self.dies_at:
            raise PeerFailed(f"{self.name} died")
        tokens, seconds = (values[min(turn, len(values) - 1)] for values in (self.tokens, self.seconds))
        return Decoded(tokens, seconds, dict(self.extra))

    def close(self) -> None:
        self.log.append((self.name, "close"))


class Prompts:
    """Sessions as far as a race asks: prompts of a cell, and why it cannot run."""

    def __init__(self, refused: dict[Cell, str] | None = None, labels: tuple[str, ...] = ()) -> None:
        self.refused, self.labels = refused or {}, labels

    def why_not(self, cell: Cell) -> str | None:
        return self.refused.get(cell)

    def workload(self, cell: Cell) -> Workload:
        rows = tuple(tuple(range(1, cell.length + 1)) for _ in range(cell.batch))
        return Workload("made", rows, 4, labels=self.labels)


def must_not_be_asked(prompt: list[int], tokens: list[int]) -> list[float]:
    raise AssertionError("the judge is asked only where tokens differ")


def raced(*others: Any, judge: Any = None, blocks: int = 3, cells: Any = (CELL,), plain: Any = None, prompts: Any = None,
          **options: Any) -> tuple[list[Any], list[tuple[str, str]]]:  # fmt: skip
    """(results, log) of a race against plain decoding; everybody writes into one log."""
    log: list[tuple[str, str]] = []
    peers = [plain or Fake("ours/off"), *others]
    for peer in peers:
        peer.log = log
    judge = judge or must_not_be_asked
    with Race(peers, prompts or Prompts(), judge, blocks=blocks, new_tokens=4, settle_s=0, **options) as race:
        return list(race.run(cells)), log


WORKER = """
import json, os, sys, time
fault = sys.argv[1] if len(sys.argv) > 1 else ""
sys.stderr.write("x" * 200_000 + "\\n")
print(json.dumps(["PYTHONPATH" in os.environ]), file=sys.stderr)
prompts = []
for line in sys.stdin:
    asked = json.loads(line)
    what = asked["do"]
    answer = {"ok": True}
    if fault == f"dies at {what}":
        sys.exit("the model is broken")
    if fault == f"hangs at {what}":
        time.sleep(60)
    if fault == f"babbles at {what}":
        print("loading ...", flush=True)
        continue
    if fault == f"refuses {what}":
        answer = {"ok": False, "why": "no room"}
    elif what == "hello":
        stray = "PYTHONPATH" in os.environ
        answer |= {"name": "fake/plain", "settings": {"threads": 3, "stray": stray}, "max_batch": 2}
    elif what == "prepare":
        prompts, count = asked["prompts"], asked["new_tokens"]
        answer |= {"prefill_s": 0.25, "settings": {"threads": 3, "rows": len(prompts)}}
    elif what == "decode":
        tokens = [[row[-1] + 1 + i for i in range(count)] for row in prompts]
        answer |= {"tokens": tokens, "seconds": 0.5 if fault != "lies" else 0, "extra": {"rounds": count}}
    print(json.dumps(answer), flush=True)
    if what == "close":
        break
"""
