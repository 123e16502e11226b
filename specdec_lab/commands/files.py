"""Places to write to, checked before anything is measured."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from .mistakes import UserMistake


def writable_folder(path: str | Path) -> Path:
    """The folder, made if needed; UserMistake when nothing can be written into it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserMistake(f"cannot write to the folder {path}: {reason}. Choose another place, or free space there") from error


def writable_file(path: str | Path, *endings: str) -> Path:
    """A file to be written later, with one of these endings if any are given."""
    path = Path(path)
    if endings and not path.name.endswith(endings):
        raise UserMistake(f"{path} must end in {' or '.join(endings)}")
    if path.is_dir():
        raise UserMistake(f"{path} is a folder; name a file in it")
    writable_folder(path.parent)
    return path


def file_name(*parts: object) -> str:
    """Parts as one name that every file system takes."""
    return "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", str(part)) for part in parts)
