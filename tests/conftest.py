"""Settings that every test shares."""

from __future__ import annotations

from hypothesis import settings

# No time limit per example: a busy machine must not turn a law red.
settings.register_profile("specdec_lab", deadline=None)
settings.load_profile("specdec_lab")
