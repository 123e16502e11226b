"""The text behind the shipped pair: which files, which split, and revisions of them.

Sources are the standard library of the running Python and, where installed, the reST sources of the Python manual
(both PSF-2.0). A file's split depends on its content alone, so copies of one text always fall on one side. This module
does not know about models or training.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_CHARACTERS, MAX_CHARACTERS = 400, 400_000
SKIPPED_FOLDERS = frozenset(
    {
        "site-packages", "dist-packages", "_bundled", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo",
        "pydoc_data", "__pycache__",
    }
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
MANUAL_ROOTS = ("/usr/share/doc/python{v}-doc/html/_sources", "/usr/share/doc/python{v}/html/_sources")
NUM_SPLITS = 25  # sha256 of the content mod 25: 0 = held-out (4%), 1 = dev, the rest train


@dataclass(frozen=True, slots=True)
class Document:
    """One file of the corpus: where it came from, its text and its split."""

    source: str  # "code" or "manual"
    name: str  # relative to the root of its source
    sha256: str
    split: str  # "train", "dev" or "held_out"
    text: str

    def entry(self) -> dict[str, str]:
        """The manifest line of this document: everything but the text."""
        return {"source": self.source, "name": self.name, "sha256": self.sha256, "split": self.split}


def split_of(digest: str) -> str:
    """The split of a text by the hash of its content."""
    return {0: "held_out", 1: "dev"}.get(int(digest, 16) % NUM_SPLITS, "train")


def find_manual() -> Path | None:
    """The reST sources of the manual of the running Python, if they are installed."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for pattern in MANUAL_ROOTS:
        root = Path(pattern.format(v=version))
        if root.is_dir():
            return root.resolve()
    return None


def _private_strings() -> tuple[str, ...]:
    """Paths of the building machine that no training text may contain."""
    return tuple({sys.prefix, sys.base_prefix, os.path.expanduser("~")} - {"/", ""})


def _read(path: Path, private: tuple[str, ...]) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None  # not text that we may read: not training material
    if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS or any(p in text for p in private):
        return None
    return text


def _candidates(manual: Path | None) -> Iterator[tuple[str, Path, Path]]:
    stdlib = Path(sysconfig.get_paths()["stdlib"]).resolve()
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not any(p.startswith(SKIPPED_PREFIXES) for p in parts):
            yield "code", stdlib, path
    if manual is not None:
        for path in sorted(manual.rglob("*.rst.txt")):
            if "changelog" not in path.name:
                yield "manual", manual, path


def collect(manual: Path | None) -> list[Document]:
    """Every admissible document, sorted by source and name; equal contents appear once."""
    private, seen, documents = _private_strings(), set(), []
    for source, root, path in _candidates(manual):
        text = _read(path, private)
        if text is None:
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            documents.append(Document(source, path.relative_to(root).as_posix(), digest, split_of(digest), text))
    return documents


def write_manifest(documents: list[Document], path: Path) -> None:
    """Write CORPUS.json: the Python version and one entry per document."""
    body = {"python": sys.version.split()[0], "documents": [d.entry() for d in documents]}
    path.write_text(json.dumps(body, indent=0) + "\n")


def check_manifest(documents: list[Document], path: Path) -> None:
    """Raise ValueError naming the files whose content differs from the manifest at `path`."""
    wanted = {(e["source"], e["name"]): e["sha256"] for e in json.loads(path.read_text())["documents"]}
    found = {(d.source, d.name): d.sha256 for d in documents}
    differing = sorted(f"{s}/{n}" for s, n in wanted.keys() | found.keys() if wanted.get((s, n)) != found.get((s, n)))
    if differing:
        raise ValueError(
            f"{len(differing)} corpus files differ from {path.name}, first: {', '.join(differing[:5])}. The text here is "
            "not the text of the manifest (another Python, or no manual). Pass --new-manifest to train on it all the same."
        )


_IDENTIFIER = re.compile(r"\b[a-z_][a-z_0-9]{3,}\b")
_NUMBER = re.compile(r"\b\d{1,4}\b")


def revise(text: str, rng: random.Random, names: list[str]) -> str:
    """An edited copy of `text`: identifiers renamed consistently, blocks moved and cut, numbers changed.

    names  identifiers to rename to. The copy is what a real revision is to its original: mostly equal, sometimes not.
    """
    blocks = text.split("\n\n")
    if len(blocks) > 4:
        if rng.random() < 0.7:  # move one block
            block = blocks.pop(rng.randrange(len(blocks)))
            blocks.insert(rng.randrange(len(blocks) + 1), block)
        for _ in range(rng.randrange(1 + len(blocks) // 12)):  # cut paragraphs
            del blocks[rng.randrange(len(blocks))]
    text = "\n\n".join(blocks)
    common = sorted({w for w in _IDENTIFIER.findall(text) if text.count(w) >= 3})
    renames = {w: rng.choice(names) for w in rng.sample(common, min(len(common), rng.randrange(5)))}
    text = _IDENTIFIER.sub(lambda m: renames.get(m.group(), m.group()), text)
    return _NUMBER.sub(lambda m: str(rng.randrange(1000)) if rng.random() < 0.1 else m.group(), text)


def identifiers(documents: list[Document], limit: int = 4000) -> list[str]:
    """The most common identifiers of the documents: the pool that revisions rename to."""
    counts: dict[str, int] = {}
    for document in documents:
        for word in set(_IDENTIFIER.findall(document.text)):
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts, key=lambda w: (-counts[w], w))[:limit]
