"""Why a tree was chosen, in one sentence with numbers: the marginal rule against the runner-up.

A node pays if f(v) > (Omega / T_step) * its marginal time, f(v) being the chance that it is on the accepted path. Summed over
the nodes in which two trees differ: the slower one adds fewer tokens than its extra time is worth at the pace of the faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..records import TreeShape
from .acceptance import Acceptance


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tree weighed: tokens of a round, and its time in plain steps. `size`: nodes, root counted, it is verified at."""

    tree: TreeShape | None
    size: int
    tokens: float
    break_even: float

    @property
    def speedup(self) -> float:
        """Against plain decoding."""
        return self.tokens / self.break_even

    @property
    def branches(self) -> bool:
        """Whether it is neither plain decoding nor a chain."""
        return self.tree is not None and not self.tree.is_chain

    @property
    def name(self) -> str:
        """Its spelling where that is short, else its size."""
        if self.tree is None:
            return "off"
        if len(spelled := str(self.tree)) <= 16:
            return spelled if self.tree.is_chain or spelled.startswith("tree:") else f"tree {spelled}"
        return f"the tree of {self.tree.num_nodes + 1} nodes and {self.tree.depth + 1} levels"


OFF = Candidate(None, 1, 1.0, 1.0)


def explain(best: Candidate, all_weighed: Sequence[Candidate], known: Acceptance) -> str:
    """The sentence: the best against the fastest of the other kinds, each time by the marginal rule."""
    branching = [candidate for candidate in all_weighed if candidate.branches]
    chains = [candidate for candidate in all_weighed if not candidate.branches and candidate.tree is not None]
    if best.tree is None:
        return "off: " + _why_off(best, [*chains, *branching], known)
    start = f"{best.name} ({best.speedup:.2f}x): "
    if best.branches:
        larger = [candidate for candidate in branching if candidate.size > best.size]
        more = _against(best, larger) if larger else "no larger size was timed"
        return f"{start}{_against(best, chains or [OFF])}; {more}"
    if not branching:
        return start + f"no tree that branches was possible with {len(known.useful(1))} useful ranks at the sizes timed"
    return start + _against(best, branching)


def _why_off(off: Candidate, rivals: Sequence[Candidate], known: Acceptance) -> str:
    if not known.useful(1):
        return "acceptance is 0 for every child of the root, so no drafted token is ever accepted"
    if not rivals:
        return "no tree fits the sizes that were timed and the levels that were allowed"
    return _against(off, rivals)


def _against(best: Candidate, rivals: Sequence[Candidate]) -> str:
    """Why the fastest of the rivals loses: its tokens against those that its time is worth at the pace of the best."""
    rival = max(rivals, key=lambda candidate: candidate.speedup)
    tokens, longer = rival.tokens - best.tokens, rival.break_even - best.break_even
    worth = f"{abs(best.speedup * longer):.3f} ({best.speedup:.2f} tokens per plain step x {abs(longer):.3f} plain steps)"
    if longer >= 0:
        return f"{rival.name} ({rival.speedup:.2f}x) would add {tokens:.3f} tokens to a round and must add more than {worth}"
    return f"{rival.name} ({rival.speedup:.2f}x) would give up {-tokens:.3f} tokens of a round and may give up at most {worth}"
