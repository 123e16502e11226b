"""Settings that every test shares."""

from __future__ import annotations

import pytest
from hypothesis import settings

from triton_interpreter import MARKER, InterpreterTests

# No time limit per example: a busy machine must not turn a law red.
settings.register_profile("specdec_lab", deadline=None)
settings.load_profile("specdec_lab")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    config.pluginmanager.register(InterpreterTests())
