"""The conformance suite: it finds planted faults, names the case, and respects what a back end refuses and promises."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from specdec_lab.engine import conformance
from specdec_lab.engine.attention import Need, Promises, ReferenceBackend, chain_reads, draft_step_reads
from specdec_lab.engine.conformance.__main__ import find, main
from specdec_lab.engine.conformance.cases import GARBAGE
from specdec_lab.records import KvView

NEED = Need("cpu", torch.float32, 16, 2, tree=True, sliding=True)
LISTS = Need("cpu", torch.float32, 16, 2, tree=True, window=False, index_list=True)
LESS = Need("cpu", torch.float32, 16, 2, max_queries=9, window=False, sliding=True)


class Planted(ReferenceBackend):
    """The meaning, in float64, with places where a fault can be planted."""

    name = "planted"
    promises = Promises(same_alone=False, same_threads=False)

    def read(self, reads):
        return reads

    def mask(self, mask, reads):
        return mask

    def bias(self, reads):
        return 0.0

    def times(self, reads, near, layer):
        """How often each key is read, [B, 1 or Hkv, T, N]: because it is near, or because it is listed."""
        return near if reads.index is None else near | reads.listed(layer, reads.longest)[:, :, None]

    def plan(self, reads, cache, group, sliding=None):
        read = self.read(reads)
        plan = super().plan(read, cache, group, sliding)
        return read, replace(plan, mask=self.mask(plan.mask, read))

    def load(self, values, read):
        return torch.where(read, values, 0.0)

    def share(self, values, group):
        return values.repeat_interleave(group, 1)

    def attend(self, q, cache, layer, plan, scale):
        reads, plan = plan
        k, v = (part[:, :, : plan.longest].double() for part in cache.layer(layer))
        times = self.times(reads, plan.mask, layer)
        read, group = times.any(-2)[..., None], q.shape[2] // k.shape[1]
        k, v = (self.share(self.load(part, read), group) for part in (k, v))
        if times.shape[1] > 1:
            times = times.repeat_interleave(group, 1)
        scores = q.double().transpose(1, 2) @ k.transpose(-1, -2) * scale + self.bias(reads) + times.log()
        return (scores.softmax(-1) @ v).transpose(1, 2).to(q.dtype)


class WindowOffByOne(Planted):
    def read(self, reads):
        view = reads.view
        return replace(reads, view=KvView.window(view.sink, view.recent + 1)) if view.kind == "window" else reads


class SinkCountedTwice(Planted):
    """Keys that are sinks and recent too weigh double, as if read once per range."""

    def bias(self, reads):
        if reads.view.kind != "window":
            return 0.0
        slots = torch.arange(reads.longest)
        distance = reads.positions[:, :, None] - slots
        twice = (slots < reads.view.sink) & (distance < reads.view.recent) & (slots < reads.committed[:, None, None])
        return torch.where(twice, 2.0, 1.0).log()[:, None]


class FutureNodeLeaks(Planted):
    def read(self, reads):
        corner = reads.corner.clone()
        corner[:, 1:] |= reads.corner[:, :-1]
        return replace(reads, corner=corner)


class SiblingsSeeEachOther(Planted):
    """The corner is taken for a chain, whatever it is."""

    def read(self, reads):
        nodes = torch.arange(reads.corner.shape[1])
        return replace(reads, corner=nodes <= reads.query_nodes[:, None])


class WindowBySlot(Planted):
    """Distances in a tree are counted in slots, not in depth."""

    def read(self, reads):
        return replace(reads, node_depths=torch.arange(reads.corner.shape[1]))


class ReadsPoison(Planted):
    """Masks scores and not loads, yet promises to."""

    def load(self, values, read):
        return values


class AllRowsAsLong(Planted):
    def read(self, reads):
        return replace(reads, committed=torch.full_like(reads.committed, int(reads.committed.max())))


class UsualScale(Planted):
    def attend(self, q, cache, layer, plan, scale):
        return super().attend(q, cache, layer, plan, q.shape[-1] ** -0.5)


class LastKeyDropped(Planted):
    def mask(self, mask, reads):
        last = (reads.committed - 1)[:, None, None, None]  # of the prefix
        return mask & (torch.arange(reads.longest) != last)


class SecondChunkForgotten(Planted):
    def mask(self, mask, reads):
        slots = torch.arange(reads.longest)
        return mask & ((slots < 2048) | (slots >= reads.committed[:, None, None, None]))


class HeadsSharedWrongly(Planted):
    def share(self, values, group):
        return values.repeat(1, group, 1, 1)


class FirstLayerOnly(Planted):
    def attend(self, q, cache, layer, plan, scale):
        return super().attend(q, cache, 0, plan, scale)


class NoSlidingLayers(Planted):
    def plan(self, reads, cache, group, sliding=None):
        return super().plan(reads, cache, group)


class OldLengths(Planted):
    """Keeps what it made for a cache, the lengths included."""

    kept = (None, None)

    def plan(self, reads, cache, group, sliding=None):
        if self.kept[0] is not cache:
            self.kept = cache, super().plan(reads, cache, group, sliding)
        return self.kept[1]


class PlansShareState(Planted):
    """The last plan made is used, whichever is given."""

    def plan(self, reads, cache, group, sliding=None):
        self.last = super().plan(reads, cache, group, sliding)

    def attend(self, q, cache, layer, plan, scale):
        return super().attend(q, cache, layer, self.last, scale)


class LiveRowsPacked(Planted):
    """Answers of the live rows come first, wherever those rows are."""

    def attend(self, q, cache, layer, plan, scale):
        out = super().attend(q, cache, layer, plan, scale)
        rows = plan[0].rows
        return out if rows is None else torch.cat([out[rows], torch.full_like(out[rows], torch.nan)])


class HeadsTakenForPacked(Planted):
    """Queries of a fused projection are read as if nothing lay between them."""

    def attend(self, q, cache, layer, plan, scale):
        packed = torch.empty(q.shape).stride()
        return super().attend(q.as_strided(q.shape, packed) if q.stride(1) > q.stride(2) else q, cache, layer, plan, scale)


class OrderTakenForGranted(Planted):
    def attend(self, q, cache, layer, plan, scale):
        packed = torch.empty(q.shape).stride()
        is_turned = q.stride(1) < q.stride(2)
        return super().attend(q.as_strided(q.shape, packed) if is_turned else q, cache, layer, plan, scale)


class HalfPrecision(Planted):
    def load(self, values, read):
        return super().load(values, read).bfloat16().double()


class WritesToTheCache(Planted):
    def attend(self, q, cache, layer, plan, scale):
        out = super().attend(q, cache, layer, plan, scale)
        cache.kv[layer, 0, 0, 0, 0] += 1
        return out


class OtherDtype(Planted):
    def attend(self, q, cache, layer, plan, scale):
        return super().attend(q.double(), cache, layer, plan, scale)


class Raises(Planted):
    def plan(self, reads, cache, group, sliding=None):
        if reads.num_queries == 33:
            raise RuntimeError("33 is too much for me")
        return super().plan(reads, cache, group, sliding)


class NeverTheSame(Planted):
    calls = 0

    def attend(self, q, cache, layer, plan, scale):
        self.calls += 1
        return super().attend(q, cache, layer, plan, scale) * (1 + 2**-22 * (self.calls % 3))


class BitsOfTheBatch(Planted):
    promises = Promises(same_threads=False)

    def attend(self, q, cache, layer, plan, scale):
        return super().attend(q, cache, layer, plan, scale) * (1 + 2**-22 * (cache.batch > 1))


class BitsOfTheThreads(Planted):
    promises = Promises(same_alone=False)

    def attend(self, q, cache, layer, plan, scale):
        return super().attend(q, cache, layer, plan, scale) * (1 + 2**-22 * (torch.get_num_threads() > 1))


class ListIgnored(Planted):
    def times(self, reads, near, layer):
        return near


class ListEntryReadTwice(Planted):
    """A block of a list that is not full repeats its last entry, and does not mask the copy."""

    def times(self, reads, near, layer):
        if reads.index is None:
            return near
        lists, ends = reads.index[layer].long(), reads.num_listed[:, None, None]
        last = lists.gather(2, (ends - 1).clamp(min=0).expand(-1, lists.shape[1], -1))
        again = torch.zeros(*lists.shape[:2], reads.longest).scatter_(2, last, (ends > 0).float().expand_as(last))
        return super().times(reads, near, layer).double() + again[:, :, None]


class ListOfTheFirstHead(Planted):
    def read(self, reads):
        return reads if reads.index is None else replace(reads, index=reads.index[:, :, :1].expand_as(reads.index))


class ListOfTheFirstLayer(Planted):
    def read(self, reads):
        return reads if reads.index is None else replace(reads, index=reads.index[:1].expand_as(reads.index))


class ListOfTheFirstRow(Planted):
    def read(self, reads):
        return reads if reads.index is None else replace(reads, index=reads.index[:, :1].expand_as(reads.index))


class ListReadToItsEnd(Planted):
    """Entries beyond num_listed count: keys of the window, of the future, of other branches."""

    def times(self, reads, near, layer):
        if reads.index is None:
            return near
        lists = reads.index[layer].long()
        inside = lists < (reads.committed[:, None, None] + reads.corner.shape[1])
        named = torch.zeros(*lists.shape[:2], reads.longest + 1, dtype=torch.float64)
        named.scatter_add_(2, torch.where(inside, lists, reads.longest), inside.double())
        return near.double() + named[:, :, None, :-1]


class ListEndsAtTheDeepestWindow(Planted):
    """What left only the deepest query's window is read by all."""

    def times(self, reads, near, layer):
        if reads.index is None:
            return near
        deep = reads.node_depths[reads.query_nodes].max() - reads.node_depths[reads.query_nodes].min()
        later = replace(reads, committed=reads.committed + deep)
        return near.double() + later.listed(layer, reads.longest)[:, :, None]


class ListEndsAtTheWindowOfTheRoot(Planted):
    """Deeper levels of a tree begin later, and so do their lists end."""

    def times(self, reads, near, layer):
        if reads.index is None:
            return near
        lists = reads.index[layer].long()
        ends = (reads.committed + 1 - reads.view.recent).clamp(min=0, max=lists.shape[-1])
        counts = torch.arange(lists.shape[-1]) < ends[:, None, None]
        named = torch.zeros(*lists.shape[:2], reads.longest + 1, dtype=torch.bool)
        return near | named.scatter_(2, torch.where(counts, lists, reads.longest), True)[:, :, None, :-1]


FAULTY_LISTS = {
    ListIgnored: "rows are wrong by", ListEntryReadTwice: "rows are wrong by", ListOfTheFirstHead: "rows are wrong by",
    ListOfTheFirstLayer: "rows are wrong by", ListOfTheFirstRow: "rows are", ListReadToItsEnd: "rows are",
    ListEndsAtTheDeepestWindow: "(chain of 5|tree of 7).*rows are wrong by",
    ListEndsAtTheWindowOfTheRoot: "(draft step 3|leaves of a tree).*rows are wrong by",
}  # fmt: skip

PLANTED = {
    WindowOffByOne: r"view \d+\+\d+.*rows are wrong by", SinkCountedTwice: r"view \d+\+\d+.*rows are wrong by",
    FutureNodeLeaks: "rows are wrong by", SiblingsSeeEachOther: "(star|tree) of .*rows are wrong by",
    WindowBySlot: r"(star|tree) of .*view \d+\+\d+.*rows are wrong by", ReadsPoison: "rows are not finite",
    AllRowsAsLong: "rows are", UsualScale: "rows are wrong by", LastKeyDropped: "rows are wrong by",
    SecondChunkForgotten: r"2049.* \+ .*rows are wrong by", HeadsSharedWrongly: "group 2.*rows are wrong by",
    FirstLayerOnly: "rows are wrong by", NoSlidingLayers: "sliding 16.*rows are wrong by",
    OldLengths: "with a token less in every row rows are wrong by", HeadsTakenForPacked: "sliced queries.*rows are",
    OrderTakenForGranted: "transposed queries.*rows are",
    PlansShareState: "a plan gives other bits after another one was made and used", LiveRowsPacked: "rows 0,2 live.*rows are",
    HalfPrecision: "rows are wrong by", WritesToTheCache: "changed the cache", OtherDtype: r"gives .*float64.* for queries of",
    Raises: "33, .*raised RuntimeError: 33 is too much for me", NeverTheSame: "other bits when asked again",
    BitsOfTheBatch: "row 0 has other bits alone than in the batch", BitsOfTheThreads: "other bits on 2 threads than on 1",
}  # fmt: skip


class Found(Exception):
    """The first fault: what comes after it is not needed."""


def stop_at_a_fault(verdict):
    if verdict.faults:
        raise Found(str(verdict))


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.__name__)
def test_a_planted_fault_is_found_and_its_case_named(planted):
    with pytest.raises(Found, match=PLANTED[planted]) as found:
        conformance.check(planted(), NEED, stop_at_a_fault)
    assert "KV heads x 16, group 2, float32: " in str(found.value)


def list_cases():
    return [case for case in conformance.cases(LISTS) if case.need.index_list]


@pytest.mark.parametrize("planted", FAULTY_LISTS, ids=lambda planted: planted.__name__)
def test_a_fault_in_reading_lists_is_found_in_chains_and_trees(planted):
    faulty = [verdict for case in list_cases() if (verdict := conformance.judge(planted(), case)).faults]
    assert all("view snapkv" in str(verdict) for verdict in faulty)
    assert any(re.search(FAULTY_LISTS[planted], str(verdict)) for verdict in faulty), [str(v) for v in faulty]
    if planted not in (ListEndsAtTheDeepestWindow, ListEndsAtTheWindowOfTheRoot):  # which one query alone cannot show
        kinds = {verdict.case.corner.name.partition(" ")[0] for verdict in faulty}
        assert kinds == {"chain", "draft", "tree", "leaves"}


def test_lists_without_a_fault_are_green_and_every_kind_of_list_is_read():
    cases, ends = list_cases(), set()
    assert 80 < len(cases) < 100
    for case in cases:
        assert conformance.judge(Planted(), case).faults == (), case.name
        reads = case.build(True).reads
        for committed, end in zip(reads.committed.tolist(), reads.num_listed.tolist(), strict=True):
            whole = end == reads.index.shape[-1]
            ends.add("none" if end == 0 else "cut short" if not whole else "whole, chosen" if committed > 90 else "whole")
    assert ends == {"none", "cut short", "whole, chosen", "whole"}


def test_a_back_end_that_refuses_lists_is_not_asked_to_read_them():
    class NoLists(Planted):
        def why_not(self, need):
            return "no lists here" if need.index_list else None

        def plan(self, reads, cache, group, sliding=None):
            assert reads.index is None, "a refused case was run"
            return super().plan(reads, cache, group, sliding)

    verdicts = [conformance.judge(NoLists(), case) for case in list_cases()]
    assert {v.refusal for v in verdicts} == {"no lists here"}
    assert not any(case.need.index_list for case in conformance.cases(NEED)), "lists are asked for by name"


def test_the_back_end_without_a_fault_is_green():
    report = conformance.check(Planted(), NEED)
    report.raise_if_red()
    assert str(report).startswith(f"attention back end planted: green, {len(report.ran)} cases run\n")
    assert report.worst["float32"].error < 1e-7


def test_a_red_report_counts_names_and_raises():
    report = conformance.check(NoSlidingLayers(), NEED)
    assert {v.case.family for v in report.faulty} == {"sliding"}
    counted = f"RED, {len(report.ran)} cases run, {len(report.faulty)} of them wrong"
    with pytest.raises(conformance.NotConforming, match=counted):
        report.raise_if_red()
    assert len(report.faulty) > 10
    assert str(report).count("sliding 16") == 10 + 1, "ten faults are named, and the worst case"
    assert report.worst["float32"].case.name in str(report)
    assert str(report).endswith(f"and {len(report.faulty) - 10} more cases")
    assert report.to_dict()["verdict"] == "RED"
    assert len(report.to_dict()["faults"]) == len(report.faulty)


def test_what_comes_out_for_a_finished_row_does_not_matter():
    class LeavesThemAlone(Planted):
        def attend(self, q, cache, layer, plan, scale):
            out = super().attend(q, cache, layer, plan, scale)
            rows = plan[0].rows
            finished = [] if rows is None else sorted(set(range(len(out))) - set(rows.tolist()))
            out[finished] = torch.nan
            return out

    cases = [case for case in conformance.cases(NEED) if case.live is not None]
    assert len(cases) == 3
    for case in cases:
        assert conformance.judge(LeavesThemAlone(), case).faults == ()


def test_what_a_back_end_refuses_is_counted_and_not_run():
    class NoTrees(Planted):
        def why_not(self, need):
            return "no trees here" if need.tree else None

        def plan(self, reads, cache, group, sliding=None):
            assert reads.causal, "a refused case was run"
            return super().plan(reads, cache, group, sliding)

    report = conformance.check(NoTrees(), NEED)
    report.raise_if_red()
    assert report.refusals == {"no trees here": sum(case.need.tree for case in conformance.cases(NEED))}
    assert f"refused {report.refusals['no trees here']} cases: no trees here" in str(report)


def test_a_back_end_that_could_run_nothing_is_not_green():
    class Cannot(Planted):
        def why_not(self, need):
            return "this machine has no such device"

    report = conformance.check(Cannot(), NEED)
    assert report.verdict == "nothing ran"
    with pytest.raises(conformance.NotConforming, match="nothing ran, 0 cases run\nrefused .* no such device"):
        report.raise_if_red()


def test_a_back_end_that_does_not_mask_loads_gets_finite_garbage_which_must_not_leak():
    class Honest(ReadsPoison):
        promises = Promises(masks_loads=False, same_alone=False, same_threads=False)

    class Leaks(Honest):
        def read(self, reads):
            return replace(reads, committed=(reads.committed + 1).clamp(max=reads.committed.max()))

    conformance.check(Honest(), LESS).raise_if_red()
    with pytest.raises(Found, match="rows are wrong by"):
        conformance.check(Leaks(), NEED, stop_at_a_fault)
    built = next(conformance.cases(NEED)).build(masks_loads=False)
    assert built.cache.kv.isfinite().all()
    assert built.cache.kv.max() == GARBAGE


def test_cases_are_made_anew_from_their_names_which_are_unique():
    cases, again = list(conformance.cases()), list(conformance.cases())
    assert cases == again
    assert max(Counter(case.name for case in cases).values()) == 1
    left, right = cases[70].build(True), again[70].build(True)
    assert torch.equal(left.q, right.q)
    assert torch.equal(left.cache.kv.nan_to_num(7.0), right.cache.kv.nan_to_num(7.0))
    assert not torch.equal(left.q, cases[71].build(True).q[:, : left.q.shape[1]])


def test_layouts_of_queries_are_what_they_are_called():
    found = {}
    for case in conformance.cases(NEED):
        q = case.build(True).q
        if q.shape[1] > 1:  # a single query lies the same either way
            found.setdefault(case.layout, set()).add((q.is_contiguous(), q.transpose(1, 2).is_contiguous()))
    assert found == {"contiguous": {(True, False)}, "sliced": {(False, False)}, "transposed": {(False, True)}}


def test_the_suite_covers_what_it_is_for():
    cases = list(conformance.cases())
    assert {case.need.dtype for case in cases if case.need.device == "cpu"} == {torch.float32, torch.bfloat16}
    assert {(case.need.head_dim, case.need.group) for case in cases} >= {(d, g) for d in (16, 64, 80, 128) for g in (1, 2, 4)}
    assert {length for case in cases for length in case.lengths} >= {0, 1, 63, 64, 65, 2047, 2048, 2049}
    assert {len(case.corner.queries) for case in cases} >= {1, 2, 3, 5, 8, 9, 16, 33, 64, 129}
    assert {str(case.view) for case in cases} >= {"full", "4+12", "0+1", "3+1", "0+63", "9+500", "4+5000"}
    corners = {case.corner.name.partition(" of ")[0] for case in cases}
    assert corners == {"chain", "star", "tree", "leaves", "draft step 0", "draft step 1", "draft step 3"}
    assert 1250 < len([case for case in cases if case.need.device == "cpu"]) < 1350, "the documentation says about 1,300"
    mixed = {(case.query_dtype, case.need.dtype) for case in cases if case.query_dtype}
    assert mixed == {(torch.float32, torch.bfloat16)}
    assert {case.layout for case in cases} == {"contiguous", "sliced", "transposed"}
    assert any(len(set(case.lengths)) > 1 for case in cases)
    full = [case.build(True).cache for case in cases if case.family == "last slot"]
    assert any(int(cache.committed.max()) + 5 == cache.capacity for cache in full)


def test_cases_stay_within_what_is_needed():
    plain = Need("cpu", torch.float32, 24, 3, max_queries=5, window=False)
    cases = list(conformance.cases(plain))
    assert cases
    for case in cases:
        need = case.need
        assert (need.head_dim, need.group, need.dtype) == (24, 3, torch.float32)
        assert (need.tree, need.window, need.sliding) == (False, False, False)
        assert need.max_queries <= 5
        assert case.view == KvView.full()


@pytest.mark.parametrize("wanted", ["chain", "draft step"])
def test_a_case_reads_what_the_engine_would_make(wanted):
    compared = 0
    for case in conformance.cases(NEED):
        if not case.corner.name.startswith(wanted):
            continue
        made, n = case.build(True).reads, len(case.corner.parents)
        longest, uniform = max(case.lengths), len(set(case.lengths)) == 1
        if wanted == "chain":
            expected = chain_reads(made.committed, n, case.view, longest, uniform)
        else:
            expected = draft_step_reads(made.committed, n - 1, case.view, longest, uniform)
        for name in ("committed", "corner", "node_depths", "query_nodes"):
            assert torch.equal(getattr(made, name), getattr(expected, name)), (case.name, name)
        for name in ("view", "longest", "uniform", "causal"):
            assert getattr(made, name) == getattr(expected, name), (case.name, name)
        compared += 1
    assert compared > 40


def test_the_thread_count_is_left_as_it_was():
    before = torch.get_num_threads()
    conformance.judge(BitsOfTheThreads(), next(c for c in conformance.cases(NEED) if c.family == "changes"))
    assert torch.get_num_threads() == before


def test_the_module_runs_back_ends_by_name_or_by_place(monkeypatch):
    said = []
    assert main(["no-such"], said.append) == 2
    known = "reference, sdpa, cpu, triton, flash_attn"
    assert f"no back end 'no-such'; known: {known}. Name others as package.module:Class" in said[0]
    assert main(["no.such:Thing"], said.append) == 2
    assert "no.such:Thing: No module named 'no'" in said[1]
    assert find("sdpa").name == "sdpa"
    monkeypatch.setitem(sys.modules, "elsewhere", sys.modules[__name__])
    monkeypatch.setattr("specdec_lab.engine.conformance.judging.cases", lambda need: conformance.cases(LESS))
    assert main(["elsewhere:Planted"], said.append) == 0
    assert main(["elsewhere:NoSlidingLayers"], said.append) == 1
    assert "planted: RED" in said[-1]


def test_a_shell_gets_the_report_and_the_exit_code():
    command = [sys.executable, "-m", "specdec_lab.engine.conformance", "tritn"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no back end 'tritn'" in done.stdout
