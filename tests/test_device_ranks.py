"""Shards in rounds on the device: what ranks say to each other, what a graph must know of them, and how headers name them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import specdec_lab as sd
import tiny
from device_world import FakeCuda
from specdec_lab.engine.device import graphs
from specdec_lab.engine.device.choice import choose_rounds
from specdec_lab.engine.device.deciding import Drafted, TorchDeciding
from specdec_lab.engine.device.program import Program
from specdec_lab.engine.device.rank_deciding import FirstRankDecides
from specdec_lab.engine.models.groups import Alone, Group
from specdec_lab.engine.sampling import Noise, Processor
from specdec_lab.engine.verify import Decision
from specdec_lab.records import SpecConfig


class Among(Alone):
    """Ranks of which another one is the first: `told` is what it says, and everything asked is noted."""

    def __init__(self, told=None, reason=None):
        super().__init__(4)
        self.words, self.told, self.reason = "4 ranks over nccl", told, reason
        self.heard, self.kept, self.replayed = [], [], 0

    def of_first(self, chosen):
        self.heard.append(chosen)
        return chosen if self.told is None else self.told(chosen)

    def why_not_captured(self):
        return self.reason

    def keep(self, graph):
        self.kept.append(graph)

    def replays(self):
        self.replayed += 1


@pytest.mark.parametrize("config", ["off", "self:4+12/chain3", "self:full/2,1"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_one_shard_of_eight_runs_on_the_device_and_says_so(config, sampling):
    engine = sd.Engine(sd.load("random:tiny", device="cpu", dtype="float32", shard="1/8"), "sdpa", rounds="eager")
    output = engine.generate([list(range(40)), list(range(9))], config, max_new_tokens=6, stop_at_eos=False, **sampling)
    assert [len(row) for row in output.tokens] == [6, 6]
    assert output.run.header.target["rounds"] == "eager, reference operations, one shard of 8, sums left out: no CUDA"
    assert "one shard of 8" in output.run.header.labels


def test_all_that_is_chosen_is_what_the_first_rank_chose():
    """Drafted tokens and what the next forward feeds, then everything of the decision."""
    program = Program.of(SpecConfig.parse("self:4+8/2,1"), torch.device("cpu"))
    group = Among(lambda chosen: chosen + 1)
    mine = Decision(*(torch.arange(n).view(1, n) for n in (1, 3, 2, 2)))
    mine = dataclasses.replace(mine, num_accepted=mine.num_accepted[:, 0])
    inner = SimpleNamespace(draft=lambda *_: Drafted(torch.tensor([[5, 7]]), torch.tensor([[5, 7]])), accept=lambda *_: mine)
    decides, nothing = FirstRankDecides(inner, group), torch.zeros(1)
    drafted = decides.draft(program, 0, nothing, nothing)
    assert drafted.tokens.tolist() == [[6, 8]] == drafted.fed.tolist()
    made = decides.accept(program, [drafted], nothing, nothing)
    assert (made.num_accepted.tolist(), made.tokens.tolist()) == ([1], [[1, 2, 3]])
    assert (made.path.tolist(), made.ranks.tolist()) == ([[1, 2]], [[1, 2]])
    assert len(group.heard) == 2, "one small message per forward"


def test_a_graph_that_holds_sums_is_kept_by_its_group_and_captured_beside_a_watching_thread(monkeypatch):
    cuda, group, played = FakeCuda(), Among(), []
    program = Program.of(SpecConfig.off(), torch.device("cpu"))
    state = SimpleNamespace(counters=lambda: (torch.zeros(1),), live=torch.ones(1))
    monkeypatch.setattr(graphs, "play", lambda stage, program: played.append(1) or ())
    for shards in (group, None):
        stage = SimpleNamespace(state=state, target=SimpleNamespace(group=shards))
        player = graphs.CapturedPlayers(stage, cuda).of(program)
        cuda.graphs[-1].again = lambda: played.append(2)
        player.play()
    assert cuda.modes == [{"capture_error_mode": "thread_local"}, {}]
    assert group.kept == [cuda.graphs[0]]
    assert group.replayed == 1


def shards_on(device, group):
    """A pair as far as the choice of rounds looks at it."""
    runner = sd.load(tiny.model("llama")).target
    runner.group, runner.device = group, torch.device(device)
    return SimpleNamespace(target=runner, draft=None)


def test_ranks_are_named_where_rounds_are_chosen_and_why_they_are_no_graphs(monkeypatch):
    monkeypatch.setattr("specdec_lab.engine.device.choice._why_no_kernels", lambda pair: None)
    assert choose_rounds("auto", shards_on("cuda", Among())).spelled == "one CUDA graph, triton operations, 4 ranks over nccl"
    eager = choose_rounds("eager", shards_on("cuda", Among())).spelled
    assert eager == "eager, triton operations, 4 ranks over nccl: rounds='eager' was asked for"
    without = shards_on("cuda", Among(reason="sums over ranks by gloo wait for the host"))
    chosen = choose_rounds("auto", without)
    assert (chosen.mode, chosen.reason) == ("host", "sums over ranks by gloo wait for the host")
    with pytest.raises(ValueError, match="rounds='device': sums over ranks by gloo wait for the host"):
        choose_rounds("device", without)


def test_a_group_is_what_the_protocol_says():
    group: Group = Alone(2)
    assert group.same("off") == "off"
    assert group.why_not_captured() is None


def test_noise_and_laws_are_nobody_s_but_the_deciding_rank_s():
    """What drafts were drawn from stays this rank's: only tokens travel."""
    program = Program.of(SpecConfig.parse("self:4+8/chain2"), torch.device("cpu"))
    inner = TorchDeciding(Processor(0.8), "rejection", Noise(3, torch.arange(2)))
    group = Among()
    drafted = FirstRankDecides(inner, group).draft(program, 0, torch.randn(2, 1, 11), torch.zeros(2, dtype=torch.int64))
    assert drafted.law.shape == (2, 1, 11)
    assert [heard.shape for heard in group.heard] == [(2, 1)]
