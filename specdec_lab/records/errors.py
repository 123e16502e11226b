"""What is raised for a spelling or a configuration that is not to be had; both are ValueErrors."""

from __future__ import annotations


class ParseError(ValueError):
    """A spelling that is not one of ours; the message quotes it, says where it fails and what is expected."""


class UnsupportedConfig(ValueError):
    """A configuration that is well spelled and that this engine, model or machine cannot run; the message says why."""
