"""`limits` and what stands behind it: cells at the physical limits of a machine, modelled and labelled so."""

from __future__ import annotations

import json

import pytest

from specdec_lab.cli import main
from specdec_lab.commands.limits_parser import quantity
from specdec_lab.costs import MACHINES, SHAPES, Draft, Limits, Machine, forward_floor, half_length, limit_row, limit_rows
from specdec_lab.records import Cell

SHAPE, H200 = SHAPES["Llama-3.1-8B"], MACHINES["h200"]
WINDOW = Draft.parse("self:4+512")


# batch, length, alpha, speed-up and chain of the limit tables (Llama-3.1-8B, one H200, window 512 and 4 sinks)
@pytest.mark.parametrize(
    ("batch", "length", "alpha", "speedup", "gamma"),
    [(1, 131072, 0.7, 1.16, 1), (8, 65536, 0.9, 2.48, 7), (32, 16384, 0.8, 1.85, 4), (128, 4096, 0.9, 1.59, 4),
     (58, 16384, 0.7, 1.76, 3)],
)  # fmt: skip
def test_rows_are_those_of_the_limit_tables(batch: int, length: int, alpha: float, speedup: float, gamma: int) -> None:
    row = limit_row(SHAPE, H200, Cell(batch, length), WINDOW, alpha)
    assert row.best is not None
    assert row.best.speedup == pytest.approx(speedup, rel=0.006)
    assert abs(row.best.gamma - gamma) <= 1, "the shortest chain within half a percent of the fastest"
    assert str(row.config) == f"self:4+512/chain{row.best.gamma}"


def test_where_nothing_can_be_gained_the_answer_is_off() -> None:
    row = limit_row(SHAPE, H200, Cell(1, 1024), WINDOW, 0.7)
    assert row.config.is_off
    assert row.best is not None
    assert row.best.speedup == 1


@pytest.mark.parametrize(("drafter", "shape"), [("self:4+512", None), ("model:full", SHAPES["1B"])])
def test_the_largest_batch_fits_and_one_more_does_not(drafter: str, shape: object) -> None:
    draft = Draft.parse(drafter, shape)
    most = limit_row(SHAPE, H200, Cell(1, 32768), draft, 0.8).largest_batch
    fits, beyond = limit_rows(SHAPE, H200, [Cell(most, 32768), Cell(most + 1, 32768)], draft, 0.8)
    assert fits.best is not None
    assert beyond.best is None
    assert (most == 29) == (shape is None), "a second network takes memory of its own"


def test_an_ngram_draft_costs_nothing_and_its_chain_is_no_longer_than_it_need_be() -> None:
    row = limit_row(SHAPE, H200, Cell(1, 4096), Draft.parse("ngram"), 0.5)
    assert row.best is not None
    assert row.best.draft_s == 0
    assert row.best.speedup == pytest.approx(2, rel=0.006)
    assert row.best.gamma == 7  # 1 - 0.5^8 of two tokens: within half a percent


def test_kv_takes_half_of_a_step_at_the_half_length() -> None:
    length = half_length(SHAPE, H200.limits, 8)
    floor = forward_floor(SHAPE, H200.limits, 8, 1, round(length))
    assert floor.attention_s == pytest.approx(floor.linear_s, rel=1e-3)


def test_the_shell_prints_a_table_that_says_modelled_and_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", "--batches", "1,32", "--lengths", "1k,16k,128k"]) == 0
    out = capsys.readouterr().out
    for words in ("modelled", "nothing was measured", "assumed", "self:4+508/chain4", "does not fit, batch 7 does", "82%"):
        assert words in out


def test_the_data_is_labelled_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--read-bandwidth", "1T", "--flops", "100T", "--memory", "80GiB", "--batches", "4", "--lengths", "8k"]
    assert main(["limits", "--shape", "qwen3-1.7b", "--json", *given]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["labels"] == ["modelled"]
    assert data["machine"] == {"name": "the machine described", "read_bytes_per_s": 1e12, "flops_per_s": 1e14,
                               "memory_bytes": 80 * 2**30, "source": "as given"}  # fmt: skip
    (cell,) = data["cells"]
    plain = forward_floor(SHAPES["1.7B"], Limits(1e12, 1e14), 4, 1, 8192)
    assert cell["plain_s"] == pytest.approx(plain.total_s)
    assert cell["kv_share"] == pytest.approx(plain.attention_s / plain.total_s)


def test_the_picture_says_modelled_in_its_title_and_draws_every_cell(tmp_path) -> None:  # noqa: ANN001
    from argparse import Namespace

    from specdec_lab.commands.limits import limits
    from specdec_lab.commands.parser import build_parser

    page = tmp_path / "limits.html"
    args = build_parser().parse_args(["limits", "--batches", "1,32", "--lengths", "4k,128k", "--out", str(page)])
    assert isinstance(args, Namespace)
    table = limits(None, args).value  # type: ignore[arg-type]  # the verb needs no laboratory
    figure = table.figure()
    assert "modelled" in figure.layout.title.text
    assert "assumed" in figure.layout.title.text
    assert len(figure.layout.annotations) == 4
    assert "does not fit" in " ".join(note.text for note in figure.layout.annotations)
    assert page.stat().st_size > 100_000
    assert "text/plain" in table._repr_mimebundle_()


@pytest.mark.parametrize(
    ("given", "says"),
    [(["--shape", "gpt-9"], "no model is called 'gpt-9'"), (["--machine", "abacus"], "no machine is called 'abacus'"),
     (["--draft", "model:full"], "in a shell: --draft-shape"), (["--draft-shape", "draft-1b"], "for these only"),
     (["--draft", "self:4"], "view '4'"), (["--alpha", "1.5"], "0 to 1, got 1.5"), (["--memory", "80X"], "got '80X'"),
     (["--out", "x.png"], ".html")],
)  # fmt: skip
def test_mistakes_are_one_line(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", *given]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("text", "value"), [("4.3T", 4.3e12), ("139GiB", 139 * 2**30), ("8e12", 8e12), ("80 g", 8e10)])
def test_quantities_are_read_with_their_prefix(text: str, value: float) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("memory", [0, -1, float("inf"), float("nan")])
def test_a_machine_is_made_of_real_numbers(memory: float) -> None:
    with pytest.raises(ValueError, match="memory_bytes"):
        Machine("x", Limits(1, 1), memory, "")
