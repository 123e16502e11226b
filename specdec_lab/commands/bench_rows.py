"""Where the benches keep what they measured: a file of rows each in the bench folder of the tuning database."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .files import writable_folder

Keep = Callable[[Iterable[Mapping[str, Any]]], None]


def keeper(args: Namespace, file: str) -> Keep:
    """What to call with finished rows: with `--save` it appends them to `file`, without it does nothing.

    UserMistake where they could not be written, which is said before anything is measured.
    """
    if not args.save:
        return lambda rows: None
    from ..tune import find_database
    from ..tune.db import append_lines

    path = writable_folder(find_database(args.db).path / "bench") / file
    return lambda rows: append_lines(path, [json.dumps(row, sort_keys=True, allow_nan=False) for row in rows])
