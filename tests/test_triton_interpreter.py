"""The mechanism that runs GPU kernels in Triton's interpreter: it runs them there, and a failure there is one here."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["pytester"]
pytest.importorskip("triton")


@pytest.fixture
def inner(pytester: pytest.Pytester) -> pytest.Pytester:
    """A session of its own with our plugin and one file of marked tests."""
    pytester.makeconftest(
        "from triton_interpreter import MARKER, InterpreterTests\n"
        "def pytest_configure(config):\n"
        "    config.addinivalue_line('markers', MARKER)\n"
        "    config.pluginmanager.register(InterpreterTests())\n"
    )
    pytester.makepyfile(
        "import os, pytest\n"
        "pytestmark = pytest.mark.interpreter\n"
        "def test_is_interpreted():\n    assert os.environ['TRITON_INTERPRET'] == '1'\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\n"
        "def test_by_case(x):\n    assert x == 'c', 'wrong letter'\n"
        "def test_skips():\n    pytest.skip('no reason')\n"
    )
    return pytester


def test_a_marked_test_runs_interpreted_and_its_outcome_and_text_are_reported_here(inner):
    assert os.environ.get("TRITON_INTERPRET") != "1"
    done = inner.runpytest("-v", "-rs")
    done.assert_outcomes(passed=2, failed=1, skipped=1)
    done.stdout.fnmatch_lines(["*test_by_case*a b*FAILED*", "*in the interpreter's process*", "*wrong letter*"])


def test_only_the_selected_tests_run_there(inner):
    inner.runpytest("-k", "is_interpreted").assert_outcomes(passed=1, deselected=3)
