"""Trees from measured parts: what is probed, what is composed, what is raced, and what the policy says of it."""

from __future__ import annotations

import json

import jsonschema
import pytest

from specdec_lab.policy import Policy, policy_schema
from specdec_lab.records import Cell, SpecConfig, TreeShape
from specdec_lab.trees import Counts, Drafting
from specdec_lab.tune import Database, ProbePlan, Protocol, compose, make_plan, tune, verify
from specdec_lab.tune.blocks import run_once
from specdec_lab.tune.db import Design, Measurement
from specdec_lab.tune.probe import counts_of, parts_of
from tree_world import TreeWorld
from world import IDENTITY, spec

PROBE = ProbePlan(least_s=0.001)


def probed(world, cell, configs, seconds=2.0, plan=PROBE):
    """Records of the probe's runs in one cell."""
    found = []
    for config in (SpecConfig.off(), *plan.runs(configs, cell)):
        if config.view is not None and config.view.kind == "snapkv" and not config.is_chain:
            continue
        weight = 3 if config.tree == plan.wide else 1
        sample = run_once(world, cell, config, weight * seconds, Protocol(), world.clock)
        found += [
            Measurement(f"m-{len(found)}-{kind}-{config}", kind, "r", "f.f", "w", 0.0, cell, str(config), Design(), summary=data)
            for kind, data in parts_of(config, sample.scored).items()
        ]
    return found


def views(drafter, *spellings):
    return [SpecConfig.parse(f"{drafter}:{view}/chain1") for view in spellings]
