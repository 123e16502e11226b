"""What one round holds at its highest besides buffers and caches, in bytes, from shapes alone.

Nearly all of it is as wide as the vocabulary: logits, laws, noise. So it is counted in bytes per row of logits and token id,
apart for every way of choosing tokens: kernels that read logits hold nothing else; where torch chooses, float64 noise and
sorted copies lie beside them. Held to what rounds really hold by tests/test_device_memory.py; what libraries allocate inside
one operation cannot be seen there and is an allowance. Not known here: caches, what is free.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ...costs import ModelShape
from ...records import TreeShape
from ..sampling import Processor

FLOAT, DOUBLE, INT, BOOL = 4, 8, 8, 1
WORDS = 20.5  # of Gumbel noise in torch while it is made: random words, a quarter of them per counter, and their logarithms
ONE_TEST = 6 * DOUBLE  # of a node's children in torch: what is left of both laws, before and after
ONE_DRAW = 28  # of torch, by inverse distribution: weights, their residual and running sum


@dataclass(frozen=True, slots=True)
class Widths:
    """A program as far as memory goes.

    nodes      drafted
    laws       forwards' rows that tokens are drafted from: nodes with children, root included
    fed        of these in one forward, at most
    branching  the same among forwards in which some node has several children
    depth      0 is plain decoding
    """

    nodes: int
    laws: int
    fed: int
    branching: int
    depth: int

    @classmethod
    def of(cls, tree: TreeShape | None) -> Widths:
        """Of plain decoding, a chain or a tree."""
        if tree is None:
            return cls(0, 0, 0, 0, 0)
        children, depth_of = Counter(tree.parents), dict[int, int]({-1: 0})
        for node, parent in enumerate(tree.parents):
            depth_of[node] = depth_of[parent] + 1
        fed = Counter(depth_of[node] for node in children)
        wide = {depth_of[node] for node, count in children.items() if count > 1}
        return cls(
            len(tree.parents), len(children), max(fed.values()), max((fed[level] for level in wide), default=0), len(fed)
        )

    @property
    def is_tree(self) -> bool:
        """Whether a layout is verified rather than a chain."""
        return self.branching > 0


@dataclass(frozen=True, slots=True)
class Choosing:
    """How tokens are chosen and accepted: by which law, and whether kernels do it or torch (ops: triton or reference)."""

    processor: Processor
    verifier: str
    ops: str

    def widest(self, w: Widths, e: int) -> float:
        """Bytes per sequence and token id when a round holds most; e bytes are one logit."""
        drafts = (w.laws - w.fed) * self.law_kept(e) + self._draft(w, e) if w.depth else 0.0
        return max(drafts, self._accept(w, e))

    def law_kept(self, e: int) -> int:
        """Of a law that drafts were drawn from, until they are verified; kernels keep the logits, unless tokens are cut off."""
        if not self._keeps_laws:
            return 0
        return max(e, FLOAT) if self._is_torch or self._is_cut else e

    def sorted_rows(self, w: Widths) -> int:
        """Rows of logits that are sorted at once."""
        return w.nodes + 1 if self.processor.top_p < 1 and not self.processor.is_greedy else 0

    @property
    def _is_torch(self) -> bool:
        return self.ops != "triton"

    @property
    def _keeps_laws(self) -> bool:
        return self.verifier == "rejection" and not self.processor.is_greedy

    @property
    def _is_cut(self) -> bool:
        return self.processor.top_k > 0 or self.processor.top_p < 1

    def _law(self, e: int) -> int:
        """While a row's law is made: logits, and what Processor.law holds beside them."""
        f = max(e, FLOAT)
        if self.processor.top_p < 1:
            return e + 5 * f + INT  # logits, sorted, their places, running mass, and a softmax and a difference of it
        return e + 2 * f + (BOOL if self.processor.top_k else 0)

    def _row(self, e: int) -> float:
        """While tokens are drawn from rows side by side."""
        if self.processor.is_greedy or not (self._is_torch or self._is_cut):
            return e
        if not self._is_torch:
            return self._law(e)
        return max(self._law(e), e + max(e, FLOAT) + DOUBLE + WORDS) if self._draws_gumbel else self._law(e)

    @property
    def _draws_gumbel(self) -> bool:
        return self.verifier == "coupled"

    def _draft(self, w: Widths, e: int) -> float:
        f, wide = max(e, FLOAT), w.fed if self._is_torch else w.branching
        rows = w.fed * self._row(e)
        if self.processor.is_greedy or not wide or (not w.is_tree and self._draws_gumbel):
            return rows
        if self._draws_gumbel:  # logits, law, its logarithm before and after the noise, which is that of a position
            return max(rows, wide * max(e + f + 2 * DOUBLE, self._law(e)) + DOUBLE)
        return max(rows, w.fed * (e + f + 3 * DOUBLE)) if self._is_torch else rows

    def _accept(self, w: Widths, e: int) -> float:
        f, rows = max(e, FLOAT), w.nodes + 1
        if self.processor.is_greedy:
            return rows * e
        if not self._keeps_laws or not w.depth:
            gumbel = e + f + DOUBLE + WORDS
            if not self._is_torch:
                return rows * self._row(e)
            if w.is_tree:  # node by node
                return rows * e + max(self._law(e), gumbel)
            return rows * max(self._law(e), gumbel)
        laws = w.laws * self.law_kept(e)
        if self._is_torch and w.is_tree:
            return rows * e + 2 * laws + max(ONE_TEST, self._law(e))
        if self._is_torch:
            return max(rows * self._law(e) + 2 * laws, rows * (e + f) + 2 * laws + ONE_DRAW)
        held = e + (f if self._is_cut else 0)
        return max(rows * self._row(e) + laws, rows * held + 2 * laws)


def forward_bytes(shape: ModelShape, batch: int, tokens: int, e: int) -> int:
    """What the layers of a forward hold: in the MLP or in attention, beside what the layer before made of the same name."""
    d, ff, q, kv = shape.hidden, shape.intermediate, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_token = max(3 * d + 4 * ff + 3 * q + 2 * kv, 4 * d + 2 * ff + 4 * q + 4 * kv)
    return batch * tokens * (per_token * e + shape.heads * FLOAT)  # log-sum-exps last


def reference_attention_bytes(shape: ModelShape, batch: int, queries: int, slots: int) -> int:
    """Dense and in float64: keys and values of every query head, then scores."""
    per_slot = 2 * shape.heads * shape.head_dim * DOUBLE
    per_slot += max(shape.kv_heads * shape.head_dim * DOUBLE, 2 * shape.heads * queries * DOUBLE)
    return batch * slots * (per_slot + 2 * queries + 1)
