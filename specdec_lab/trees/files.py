"""Files of other projects: `.pt` and `.json` into plain lists and numbers, or the name of the check that failed.

The only place of this room that knows torch, and only while a `.pt` file is read: with weights_only=True, so that a file can
hold numbers and lists but run nothing.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

FilePath = str | os.PathLike[str]


class TreeFileError(ValueError):
    """A file that does not hold what it should: the file, the name of the failed check, what was found."""

    def __init__(self, path: FilePath, check: str, found: str) -> None:
        super().__init__(f"{os.fspath(path)}: check '{check}' failed: {found}")
        self.path, self.check = Path(path), check


def read_file(path: FilePath) -> Any:
    """What a `.pt` or `.json` file holds; tensors stay tensors. A file that is not there is a FileNotFoundError."""
    match Path(path).suffix:
        case ".json":
            return _read_json(path)
        case ".pt":
            return _read_torch(path)
        case other:
            raise TreeFileError(path, "readable", f"the name ends in {other!r}; .pt and .json files can be read")


def plain(value: Any) -> Any:
    """A tensor as nested lists; everything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_whole(value: Any) -> bool:
    """Whether it is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_time(value: Any) -> bool:
    """Whether it is a finite number of 0 or more."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _read_json(path: FilePath) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:  # not UTF-8, or not JSON
        raise TreeFileError(path, "readable", f"not JSON: {error}") from None


def _read_torch(path: FilePath) -> Any:
    import torch

    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TreeFileError(path, "readable", f"not a file of tensors, lists and numbers: {first}") from None
