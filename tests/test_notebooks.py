"""Stored notebooks: run in order, readable without a kernel, and free of the machine that ran them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
HOME_OR_ROOT = re.compile(r"(?<![\w.~/])/(?:home|root|Users|work|tmp|var|mnt|opt)/[\w.]")
TIMESTAMP = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d")


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def test_there_is_a_first_notebook():
    assert NOTEBOOKS
    assert NOTEBOOKS[0].name == "01_first_run.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_cells_were_executed_in_order_and_did_not_fail(path):
    cells = code_cells(path)
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "a reader should see no warnings"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_what_is_stored_shows_without_a_kernel_and_tells_nothing_of_the_machine(path):
    text = path.read_text()
    notebook = json.loads(text)
    assert len(text) < 300_000
    assert "widgets" not in notebook["metadata"], "GitHub refuses it, and its state would blank the fallback"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert not HOME_OR_ROOT.search(text), HOME_OR_ROOT.search(text)
    assert not TIMESTAMP.search(text), TIMESTAMP.search(text)
    for cell in code_cells(path):
        for output in cell["outputs"]:
            kinds = set(output.get("data", {}))
            if kinds - {"text/plain"}:
                assert "text/plain" in kinds
                assert kinds & {"text/html", "image/png"}, kinds
