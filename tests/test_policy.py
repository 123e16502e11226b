"""The policy: what a file may say, what lookup answers, how a running engine switches."""

from __future__ import annotations

import copy
import json
import math
import warnings
from itertools import groupby

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import off_step, round_step
from specdec_lab.policy import Estimate, Policy, PolicyError, PolicyMismatch, Row, Rules, policy_schema
from specdec_lab.policy.lookup import Guard, Hysteresis, Outside
from specdec_lab.records import Cell, Identity, SpecConfig

WINDOW, FULL, NGRAM = "self:4+60/chain3", "model:full/chain4", "ngram/chain8"
DRAFTERS = {"self": {"k": 1}, "ngram": {}, "model": {"m": 1}}
IDENTITY = Identity("TEST_2t", {"device": "TEST_2t", "target": "abc", "threads": 2}, DRAFTERS)


def header(**changes):
    return {
        "created": "2026-01-02T03:04:05Z", "device": "TEST_2t", "versions": {"torch": "2.13"},
        "base": IDENTITY.base_fingerprint, "target": "tiny",
        "drafters": {kind: IDENTITY.drafter_fingerprint(kind) for kind in ("self", "ngram", "model")},
        "dtype": "float32", "workload": "prose", "labels": [], "objective": "tokens_per_s",
        "evidence": [{"file": "tiny--self.jsonl", "sha256": "00"}],
        "exact": {"base": dict(IDENTITY.base), "drafters": {k: dict(v) for k, v in IDENTITY.drafters.items()}}, **changes,
    }  # fmt: skip


def row(cell, config="off", **speedups):
    """A tuned row; speedups by name: window, full, ngram."""
    names = {"window": WINDOW, "full": FULL, "ngram": NGRAM}
    estimates = {names[n]: Estimate(s, (s * 0.98, s * 1.02), "measured", ("m-1",), 1.5) for n, s in speedups.items()}
    best = estimates[config] if config != "off" else Estimate(1.0, (1.0, 1.0), "measured")
    return Row(
        Cell.parse(cell), "tuned", config=config, speedup=best.speedup, speedup_ci95=best.ci95, tokens_per_s=100 * best.speedup,
        baseline_tokens_per_s=100.0, estimates=estimates, details={"num_trials": 12},
    )  # fmt: skip


def policy(*rows, rules=None, **changes):
    return Policy(header(**changes), rules or Rules(), ("off", WINDOW, FULL, NGRAM), rows)


GRID = (
    row("1x512", "off", window=0.8, full=0.9, ngram=0.95),
    row("1x4096", WINDOW, window=1.2, full=1.1, ngram=0.95),
    row("8x512", "off", window=0.7, full=0.8, ngram=0.6),
    row("8x4096", WINDOW, window=1.8, full=1.3, ngram=0.6),
)


def test_a_file_holds_what_the_policy_says_and_saving_again_gives_the_same_bytes(tmp_path):
    first = policy(*GRID).save(tmp_path / "a.policy.json")
    again = Policy.load(first)
    again.save(tmp_path / "b.policy.json")
    assert first.read_bytes() == (tmp_path / "b.policy.json").read_bytes()
    assert [r.config for r in again.table] == [r.config for r in GRID]
    assert again.table[1].details == {"num_trials": 12}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.policy.json", "b.policy.json"]


@given(st.floats(1e-6, 1e6), st.floats(0.5, 4))
def test_six_digits_are_stable_under_loading(speed, speedup):
    one = row("4x1k", WINDOW, window=speedup)
    made = policy(Row(one.cell, "tuned", "", WINDOW, speedup, one.speedup_ci95, speed, speed / 3, one.estimates, {}))
    assert Policy.from_dict(json.loads(made.dumps())).dumps() == made.dumps()


def test_files_pass_the_published_schema():
    others = (Row(Cell(64, 32768), "infeasible", "KV 256 GiB > 115 GiB free"), Row(Cell(64, 512), "not_visited", "budget"))
    jsonschema.validate(json.loads(policy(*GRID, *others).dumps()), dict(policy_schema()))


def broken_policies():
    good = json.loads(policy(*GRID, Row(Cell(64, 32768), "infeasible", "too large")).dumps())

    def change(path, value):
        data = copy.deepcopy(good)
        *most, last = path
        place = data
        for key in most:
            place = place[key]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
        return data

    for key in ("schema", "header", "lookup", "portfolio", "table"):
        yield f"no {key}", change([key], KeyError)
    for key in sorted(good["header"].keys() - {"exact"}):
        yield f"no header.{key}", change(["header", key], KeyError)
    cases = [
        (["schema"], "specdec_lab.policy/2"), (["unknown"], 1), (["header", "base"], "xyz"), (["header", "objective"], "fun"),
        (["header", "workload"], ""), (["header", "drafters", "eagle"], "0" * 12), (["header", "drafters", "self"], "0"),
        (["header", "evidence", 0], {"file": "a"}), (["header", "labels"], "none"), (["lookup", "method"], "magic"),
        (["lookup", "value"], "ci_high"), (["lookup", "min_speedup"], 0.9), (["lookup", "min_speedup"], "1.03"),
        (["lookup", "outside", "batch_above"], "guess"), (["lookup", "outside", "length_above"], KeyError),
        (["lookup", "ctx_agg"], "sum"), (["lookup", "new_rule"], 1), (["lookup", "hysteresis", "min_dwell_steps"], -1),
        (["lookup", "hysteresis", "recheck_tokens"], 1.5), (["lookup", "guard", "window_steps"], 0),
        (["lookup", "guard", "wait"], 0), (["portfolio"], [WINDOW, FULL, NGRAM]), (["portfolio", 0], "eagle/chain3"),
        (["portfolio", 1], "off"), (["portfolio"], "off"), (["table"], {}), (["table", 0, "cell"], "0x512"),
        (["table", 0, "cell"], "8"), (["table", 0, "state"], "guessed"), (["table", 0, "config"], KeyError),
        (["table", 0, "speedup"], 0), (["table", 0, "speedup_ci95"], [1]), (["table", 0, "speedup_ci95"], ["a", "b"]),
        (["table", 0, "estimates"], KeyError), (["table", 0, "estimates", WINDOW, "how"], "guessed"),
        (["table", 0, "estimates", WINDOW, "speedup"], -1), (["table", 0, "estimates", WINDOW, "more"], 1),
        (["table", 4, "config"], "off"), (["table", 0, "baseline_tokens_per_s"], True),
    ]  # fmt: skip
    for path, value in cases:
        yield f"{'.'.join(map(str, path))} = {value!r}", change(path, value)


@pytest.mark.parametrize(("name", "data"), list(broken_policies()), ids=lambda x: x if isinstance(x, str) else "")
def test_what_the_schema_refuses_is_refused_by_hand_too(name, data):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, dict(policy_schema()))
    with pytest.raises(PolicyError):
        Policy.from_dict(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["portfolio"].__setitem__(1, "self:4+60/1,1,1"), "must be spelled 'self:4\\+60/chain3'"),
        (lambda d: d["header"]["drafters"].pop("ngram"), "drafter 'ngram', which has no fingerprint"),
        (lambda d: d["table"][1].__setitem__("config", "self:4+124/chain3"), "is not in the portfolio"),
        (lambda d: d["table"].append(d["table"][0]), "has cell 1x512 more than once"),
        (lambda d: d["table"][0].__setitem__("speedup_ci95", [1.2, 1.1]), "must be \\[low, high\\]"),
    ],
)
def test_what_a_schema_cannot_say_is_checked_by_hand(change, words):
    data = json.loads(policy(*GRID).dumps())
    change(data)
    with pytest.raises(PolicyError, match=words):
        Policy.from_dict(data)


def test_errors_name_file_field_reason_and_next_step(tmp_path):
    data = json.loads(policy(*GRID).dumps())
    data["table"][2]["speedup"] = "fast"
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PolicyError, match=r"p.json, table\[2\].speedup: must be a finite number, got 'fast'. Write it again"):
        Policy.load(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(PolicyError, match="is not JSON"):
        Policy.load(path)
    path.write_text('{"schema": NaN}')
    with pytest.raises(PolicyError, match="NaN is not a JSON number"):
        Policy.load(path)
    with pytest.raises(PolicyError, match=r"none.json: cannot be read: No such file.*specdec-lab tune"):
        Policy.load(tmp_path / "none.json")


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = policy(*GRID).save(tmp_path / "p.json")
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PolicyError, match="No space left on device.*old file is untouched"):
        policy(GRID[0]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_lookup_at_a_measured_cell_is_the_winner_of_that_cell():
    made = policy(*GRID)
    for r in GRID:
        assert str(made.lookup(r.cell.batch, r.cell.length)) == r.config


def test_an_unconfirmed_estimate_never_outbids_the_winner_of_a_cell():
    made = policy(row("1x512", WINDOW, window=1.2, full=1.9), row("1x4096", "off", window=1.5))
    assert str(made.lookup(1, 512)) == WINDOW
    assert made.lookup(1, 4096).is_off


def test_inside_the_grid_the_log_of_the_lower_bound_is_bilinear_in_log2():
    made = policy(*GRID)
    middle = made.choice(1, math.sqrt(512 * 4096)).values
    assert middle[WINDOW] == pytest.approx(0.5 * math.log(0.8 * 0.98) + 0.5 * math.log(1.2 * 0.98))
    quarter = made.choice(2, 512 * 8**0.75).values[WINDOW]  # a third of the way in batch, three quarters in length
    ends = [0.75 * math.log(b * 0.98) + 0.25 * math.log(a * 0.98) for a, b in ((0.8, 1.2), (0.7, 1.8))]
    assert quarter == pytest.approx(2 / 3 * ends[0] + 1 / 3 * ends[1])


def test_the_value_may_be_the_mean():
    made = policy(*GRID, rules=Rules(value="mean"))
    assert made.choice(8, 4096).value == pytest.approx(math.log(1.8))


def test_below_min_speedup_the_answer_is_off():
    made = policy(*GRID, rules=Rules(min_speedup=1.5))
    assert made.lookup(1, 4096).is_off
    assert "below 1.5x" in made.choice(1, 4096).reason
    assert str(made.lookup(8, 4096)) == WINDOW


@pytest.mark.parametrize(
    ("method", "batch", "length", "expected"),
    [("nearest", 1, 1500, WINDOW), ("nearest", 1, 1400, "off"), ("ceil", 2, 600, WINDOW), ("floor", 7, 4000, "off"),
     ("floor", 8, 4096, WINDOW), ("ceil", 8, 512, "off")],
)  # fmt: skip
def test_nearest_ceil_and_floor_take_one_cell(method, batch, length, expected):
    made = policy(*GRID, rules=Rules(method=method))
    assert str(made.lookup(batch, length)) == expected


def test_outside_the_grid_the_rules_decide():
    made = policy(row("4x512", WINDOW, window=1.4, full=1.3), row("4x4096", FULL, window=1.5, full=1.9))
    assert made.lookup(5, 512).is_off
    assert str(made.lookup(1, 512)) == WINDOW
    assert made.lookup(4, 511).is_off
    assert str(made.lookup(4, 50_000)) == WINDOW, "a draft that reads the full KV gets dearer with length: not clamped"
    clamping = Rules(outside=Outside(batch_above="clamp", length_below="clamp"))
    made = policy(*made.table, rules=clamping)
    assert str(made.lookup(500, 100)) == WINDOW


def test_a_candidate_that_was_not_measured_in_every_corner_is_not_chosen():
    made = policy(row("1x512", WINDOW, window=1.3, full=1.2), row("1x4096", FULL, full=1.2))
    assert str(made.lookup(1, 1024)) == FULL
    assert "not measured in every one of these cells" in made.explain(1, 1024)
    unvisited = policy(row("1x512", WINDOW, window=1.3), Row(Cell(1, 4096), "not_visited", "budget"))
    assert unvisited.lookup(1, 1024).is_off
    assert str(unvisited.lookup(1, 512)) == WINDOW


@given(st.integers(1, 20), st.floats(1, 20_000))
def test_lookup_never_answers_from_or_beyond_an_infeasible_cell(batch, length):
    table = (row("1x512", WINDOW, window=1.4), row("1x4096", WINDOW, window=1.4), row("8x512", WINDOW, window=1.4))
    made = policy(*table, Row(Cell(8, 4096), "infeasible", "KV 9 GiB > 8 GiB free"), rules=Rules(outside=Outside("clamp")))
    answer = made.lookup(batch, length)
    assert answer.is_off or not (batch >= 8 and length >= 4096)
    assert answer.is_off == (length < 512 or (batch >= 8 and length >= 4096))
    if batch >= 8 and length >= 4096:
        assert "infeasible: KV 9 GiB" in made.explain(batch, length)


@given(st.integers(1, 9), st.floats(0, 9000))
def test_lookup_is_pure_and_explained(batch, length):
    made = policy(*GRID)
    before = made.dumps()
    assert made.lookup(batch, length) == made.lookup(batch, length)
    assert made.explain(batch, length).startswith(f"{batch}x{length:g}: {made.lookup(batch, length)}, because")
    assert made.dumps() == before


def test_lookup_refuses_what_is_no_batch():
    with pytest.raises(ValueError, match="batch of at least 1"):
        policy(*GRID).lookup(0, 512)


def test_an_empty_table_answers_off():
    assert policy().lookup(1, 512).is_off


def test_compiled_tables_agree_with_lookup():
    made = policy(*GRID)
    edges = [512, 1024, 2048, 3000, 4096]
    table = made.compile(8, edges)
    assert (len(table), {len(line) for line in table}) == (8, {5})
    for batch in range(1, 9):
        for bucket, (first, after) in enumerate(zip(edges, [*edges[1:], 4097], strict=True)):
            name = made.portfolio[table[batch - 1][bucket]]
            assert name in ("off", str(made.lookup(batch, math.sqrt(first * (after - 1)))))
    assert made.portfolio[table[7][4]] == WINDOW
    with pytest.raises(ValueError, match="rising length edges"):
        made.compile(8, [512, 512])


def test_the_headline_counts_what_was_measured():
    made = policy(*GRID, Row(Cell(64, 512), "infeasible", "x"))
    assert made.headline() == "speculate in 2 of 4 feasible cells, 1.20x to 1.80x"
    assert policy(*GRID[:2]).headline() == "speculate in 1 of 2 feasible cells, 1.20x"
    assert "plain decoding wins everywhere" in policy(GRID[0]).headline()


# The policy at work


def steady(made, identity=None, rounds=1, batch=1, length=4096.0):
    choose = made.chooser(identity)
    return choose, [str(choose(batch, length)) for _ in range(rounds)]


def test_the_first_answer_is_the_lookup():
    assert steady(policy(*GRID))[1] == [WINDOW]
    assert steady(policy(*GRID), length=512.0)[1] == ["off"]


def test_a_length_that_wavers_around_a_border_does_not_flap():
    made = policy(*GRID)
    border = next(n for n in range(512, 4096) if not made.lookup(1, n).is_off)
    assert made.lookup(1, border - 1).is_off
    choose = made.chooser()
    answers = [str(choose(1, border + (i % 2) - 1)) for i in range(2000)]
    assert sum(a != b for a, b in zip(answers, answers[1:], strict=False)) <= 1


def test_a_switch_needs_a_gain_and_a_dwell_time():
    near = policy(row("1x512", WINDOW, window=1.50, full=1.48), row("1x4096", FULL, window=1.50, full=1.51))
    choose = near.chooser()
    assert [str(choose(1, n)) for n in (512, 1500, 4000, 4096)] == [WINDOW] * 4, "a gain below 2 % is not worth a switch"
    far = policy(row("1x512", WINDOW, window=1.5, full=1.4), row("1x4096", FULL, window=1.5, full=2.0))
    choose = far.chooser()
    answers = [str(choose(1, 512))] + [str(choose(1, 4096)) for _ in range(40)]
    assert answers.index(FULL) == Hysteresis().min_dwell_steps


def test_growing_text_is_looked_at_again_only_every_so_many_tokens():
    far = policy(row("1x512", WINDOW, window=1.5, full=1.4), row("1x4096", FULL, window=1.5, full=2.0))
    choose = far.chooser()
    lengths = range(512, 4097)
    answers = [str(choose(1, n)) for n in lengths]
    switch = lengths[answers.index(FULL)]
    assert (switch - 512) % Hysteresis().recheck_tokens == 0
    assert answers[answers.index(FULL) :] == [FULL] * (len(lengths) - answers.index(FULL))


def test_what_may_not_run_any_more_ends_at_once():
    choose = policy(*GRID).chooser()
    assert str(choose(8, 4096)) == WINDOW
    assert choose(9, 4096).is_off, "batch above the grid: no dwell time for safety"


def test_a_batch_that_shrinks_is_looked_at_again_at_once():
    rules = Rules(hysteresis=Hysteresis(min_dwell_steps=0, recheck_tokens=10**6))
    made = policy(row("1x512", "off", window=0.8), row("4x512", WINDOW, window=1.5), rules=rules)
    choose = made.chooser()
    assert str(choose(4, 512)) == WINDOW
    assert choose(1, 512).is_off


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        (Identity("OTHER", {**IDENTITY.base, "device": "OTHER"}, DRAFTERS), "device: 'TEST_2t', here 'OTHER'"),
        (Identity("TEST_2t", {**IDENTITY.base, "target": "xyz"}, DRAFTERS), "target: 'abc', here 'xyz'"),
        (Identity("TEST_2t", IDENTITY.base, {**DRAFTERS, "model": {"m": 2}}), "drafter 'model' is another one: m: 1, here 2"),
        (Identity("TEST_2t", IDENTITY.base, {"self": {"k": 1}, "ngram": {}}), "drafter 'model', which is not loaded"),
    ],
)
def test_a_foreign_policy_says_what_differs_once_and_answers_off_for_ever(identity, words):
    made = policy(*GRID)
    assert words in made.mismatch(identity)
    with pytest.warns(PolicyMismatch, match="policy not used") as caught:
        choose, answers = steady(made, identity, rounds=500, batch=8)
    assert (set(answers), len(caught)) == ({"off"}, 1)
    assert words in str(caught[0].message)
    choose.observe(round_step((1,)))
    assert choose(8, 4096).is_off


def test_a_foreign_policy_without_exact_fields_still_says_what_it_can():
    made = policy(*GRID, exact={})
    other = Identity("OTHER", {"device": "OTHER"}, IDENTITY.drafters)
    assert "made for device TEST_2t, this is OTHER" in made.mismatch(other)
    same_device = Identity("TEST_2t", {"device": "TEST_2t", "target": "new"}, IDENTITY.drafters)
    assert f"fingerprint {IDENTITY.base_fingerprint}" in made.mismatch(same_device)


def test_a_policy_of_this_machine_is_used_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose, answers = steady(policy(*GRID), IDENTITY)
    assert (choose.mismatch, answers) == (None, [WINDOW])


# The guard: break-even of every estimate above is 1.5 tokens per row and round


ALONE = (row("1x4096", WINDOW, window=1.2, full=0.9, ngram=0.95),)  # nothing else gains there


def guarded(table=ALONE):
    return policy(*table, rules=Rules(guard=Guard(window_steps=16, cooldown_steps=40, margin=0.03))).chooser()


def feed(choose, accepted, rounds):
    """What it answers while every round accepts so many tokens."""
    answers = []
    for _ in range(rounds):
        config = choose(1, 4096)
        answers.append(str(config))
        choose.observe(off_step(1) if config.is_off else round_step((accepted,), config=str(config)))
    return answers


def test_acceptance_that_pays_is_left_alone():
    assert set(feed(guarded(), 1, 500)) == {WINDOW}


def test_acceptance_below_break_even_rests_then_probes_at_growing_intervals():
    answers = feed(guarded(), 0, 400)
    runs = [(name, len(list(group))) for name, group in groupby(answers)]
    assert runs[:6] == [(WINDOW, 16), ("off", 40), (WINDOW, 2), ("off", 80), (WINDOW, 2), ("off", 160)]


def test_a_probe_that_pays_brings_the_draft_back():
    choose = guarded()
    assert feed(choose, 0, 16 + 40)[-1] == "off"
    assert set(feed(choose, 3, 200)) == {WINDOW}
    assert feed(choose, 0, 20)[-1] == "off", "and a full window is judged again"


def test_margin_keeps_the_guard_from_firing_at_break_even():
    half = [0, 1] * 200  # 1.5 tokens per round: exactly break-even
    choose = guarded()
    answers = [feed(choose, accepted, 1)[0] for accepted in half]
    assert set(answers) == {WINDOW}


def test_rounds_that_say_nothing_are_not_counted():
    choose = guarded()
    choose(1, 4096)
    for _ in range(100):
        choose.observe(round_step((0,), config=WINDOW, censored=(True,)))
        choose.observe(round_step((0,), config=WINDOW, frozen=(0,)))
        choose.observe(round_step((0,), config=FULL))
    assert str(choose(1, 4096)) == WINDOW


def test_a_policy_speaks_the_language_of_the_engine():
    assert policy(*GRID).chooser()(8, 4096) == SpecConfig.parse(WINDOW)
