"""The compiled way down a tree against its float64 meaning and against the engine's own, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from specdec_kernels.tree_walk import cpu, reference
from specdec_lab.engine import tree_verify
from specdec_lab.engine.models.runner import Scores
from specdec_lab.engine.sampling import Noise, Processor
from specdec_lab.engine.tree_layout import layout_of
from specdec_lab.engine.tree_verify import choose_children
from specdec_lab.engine.verify import Proposal
from specdec_lab.records import TreeShape

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason="no compiler here")

CPU = torch.device("cpu")
TREES = ("4,2,1", "1,3", "tree:-1,-1,0,0,1", "tree:-1,0,-1,0,2,3,-1", "6", ",".join(["1"] * 7 + ["3"]))
PURPOSES = reference.Purposes(3, 1, 2)


class World:
    """Random laws, drafts drawn from laws near them, and positions: what a round would decide."""

    def __init__(self, tree, seed, rows=40, vocab=23, verifier="rejection", sharp=1.0, some=False):
        g = torch.Generator().manual_seed(seed)
        self.layout, self.verifier, self.seed = layout_of(TreeShape.parse(tree), CPU), verifier, seed + 2**40
        self.noise = Noise(self.seed, torch.arange(rows) * 7)
        self.first = torch.randint(0, 3000, (rows,), generator=g)
        self.scores = Scores(torch.randn(rows, self.layout.num_nodes + 1, vocab, generator=g) * sharp)
        near = self.scores.logits + 0.5 * torch.randn(self.scores.logits.shape, generator=g)
        tokens, laws = [], []
        for depth, level in enumerate(self.layout.levels):
            chosen, law = choose_children(
                Scores(near[:, level.query_nodes]), level.most, self.first + depth, Processor(1.0), verifier, self.noise
            )
            tokens.append(chosen.flatten(1)[:, level.pick])
            laws.append(law)
        law = None if laws[0] is None else torch.cat(laws, 1)
        exists = torch.rand(rows, self.layout.num_nodes, generator=g) < 0.8 if some else None
        self.proposal = Proposal(torch.cat(tokens, 1), torch.full((rows,), self.layout.num_nodes), law, self.layout, (), exists)

    def decide(self):
        return tree_verify.decide_tree(
            self.proposal, self.scores, self.first, Processor(1.0), self.verifier, self.noise
        )

    def walk(self, start):
        p, layout = self.proposal, self.layout
        going = start(
            p.tokens, p.exists, layout.num_children, layout.depth, p.law, self.seed, self.noise.sequences, self.first, PURPOSES
        )
        law = self.scores.logits.softmax(-1)
        while going.step(law[torch.arange(len(law)), going.node]):
            pass
        return going.made


CASES = [(tree, verifier, sharp, some) for tree in TREES for verifier, sharp, some in (
    ("rejection", 1.0, False), ("rejection", 3.0, True), ("rejection", 40.0, False), ("coupled", 1.0, False),
    ("coupled", 2.0, True),
)]  # fmt: skip


@pytest.mark.parametrize(("tree", "verifier", "sharp", "some"), CASES)
def test_the_compiled_walk_is_its_meaning_in_float64(tree, verifier, sharp, some):
    world = World(tree, len(tree) + some, verifier=verifier, sharp=sharp, some=some)
    made = world.walk(cpu.start)
    assert torch.equal(made, world.walk(reference.start))
    assert made[:, 0].max() > 0
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(world.walk(cpu.start), made)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("tree", "verifier", "sharp", "some"), CASES)
def test_the_engine_decides_by_compiled_steps_what_it_decides_without(tree, verifier, sharp, some, monkeypatch):
    world = World(tree, 3 * len(tree), rows=400, verifier=verifier, sharp=sharp, some=some)
    started, start = [], cpu.start
    monkeypatch.setattr(cpu, "start", lambda *given: started.append(given) or start(*given))
    quick = world.decide()
    assert len(started) == 1
    monkeypatch.setattr(tree_verify, "_is_compiled", lambda scores, law: False)
    slow = world.decide()
    assert len(started) == 1
    assert torch.equal(quick.num_accepted, slow.num_accepted)
    for row, count in enumerate(quick.num_accepted.tolist()):
        assert torch.equal(quick.tokens[row, : count + 1], slow.tokens[row, : count + 1])
        assert torch.equal(quick.path[row, :count], slow.path[row, :count])
        assert torch.equal(quick.ranks[row, :count], slow.ranks[row, :count])
    if sharp < 10:  # sharper laws accept nearly all
        assert (quick.num_accepted == 0).any()
    assert quick.num_accepted.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"children": (2, 0)}, "2 numbers of children"), ({"children": (0, 1, 0)}, "not those of a tree"),
        ({"children": (1, 1, 0), "depth": 1}, "not those of a tree"), ({"laws": 1}, "not those of a tree"),
        ({"first": torch.zeros(2)}, "first is int64"), ({"sequences": torch.zeros(3, dtype=torch.int64)}, "sequences is int64"),
        ({"exists": torch.ones(2, 3, dtype=torch.bool)}, "exists is bool"), ({"law": torch.ones(2, 5).double()}, "float32 law"),
        ({"law": torch.ones(2, 6)}, "of one V"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(change, words):
    laws, law = torch.ones(2, change.get("laws", 2), 5) / 5, change.get("law", torch.ones(2, 5) / 5)
    going_down = (change.get("children", (1, 1, 0)), change.get("depth", 2), laws, 1)
    zeros = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):  # noqa: PT012  # some show when made, some at the first step
        walk = cpu.start(
            torch.zeros(2, 2, dtype=torch.int64), change.get("exists"), *going_down, change.get("sequences", zeros),
            change.get("first", zeros), PURPOSES,
        )  # fmt: skip
        while walk.step(law):
            pass
