"""GPU kernels in Triton's interpreter, beside tests that must not know of it.

Triton reads TRITON_INTERPRET when it is first imported, so a file whose tests need the interpreter runs in a process apart:

    pytest.importorskip("triton")
    pytestmark = pytest.mark.interpreter

and is otherwise written like any other. The first of its tests to run starts pytest again on all tests of the file that this
session selected, with the variable set; then each test here passes, skips or fails as its twin there did, with its text.
Started with TRITON_INTERPRET=1 already set, the tests run in place: for a debugger.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

MARKER = "interpreter: runs with TRITON_INTERPRET=1, in a process of its own for each file"
SHOWN_CHARACTERS = 6000
TIME_LIMIT_S = 900


def why_not() -> str | None:
    """None if Triton's interpreter runs our loops here, else the reason: 3.6, as beside CUDA torch 2.11, may not."""
    import numpy as np
    import triton

    old, new = (tuple(int(n) for n in m.__version__.split(".")[:2]) for m in (triton, np))
    if old < (3, 7) and new >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} cannot loop over what was loaded with numpy {np.__version__}"
    return None


class InterpreterTests:
    """The pytest plugin: what ran elsewhere is reported here."""

    def __init__(self) -> None:
        self._outcomes: dict[Path, dict[str, ET.Element]] = {}

    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Answer for the twin of a marked test; every other test is left to pytest."""
        if pyfuncitem.get_closest_marker("interpreter") is None:
            return None
        if (reason := why_not()) is not None:
            pytest.skip(reason)
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if pyfuncitem.path not in self._outcomes:
            mates = [item for item in pyfuncitem.session.items if item.path == pyfuncitem.path]
            self._outcomes[pyfuncitem.path] = _run(pyfuncitem.config.rootpath, [item.nodeid for item in mates])
        _report(self._outcomes[pyfuncitem.path].get(pyfuncitem.name), pyfuncitem)
        return True


def _run(root: Path, tests: list[str]) -> dict[str, ET.Element]:
    """Every test's junit element by its name. A process that dies before it writes them fails the test that asked, whole."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *tests]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S)
        if not results.exists():
            pytest.fail(f"the interpreter's process wrote no results:\n{_end(done.stdout + done.stderr)}", pytrace=False)
        return {case.get("name", ""): case for case in ET.parse(results).iter("testcase")}


def _report(case: ET.Element | None, item: pytest.Function) -> None:
    """Pass, skip or fail as the twin did."""
    if case is None:
        pytest.fail(f"{item.nodeid} was not run in the interpreter's process", pytrace=False)
    for kind in ("failure", "error"):
        found = case.find(kind)
        if found is not None:
            pytest.fail(f"in the interpreter's process:\n{_end(found.text or found.get('message', ''))}", pytrace=False)
    skipped = case.find("skipped")
    if skipped is not None:
        pytest.skip(skipped.get("message", ""))


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"...\n{text[-SHOWN_CHARACTERS:]}"
