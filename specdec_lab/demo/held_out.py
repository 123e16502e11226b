"""Write the shipped held-out text: `python -m specdec_lab.demo.held_out`.

The documents of the corpus that training never saw, unchanged, and a revision of each long one: an original, an empty
line, and an edited copy of it. Also copies the licence under which this text is shipped.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ..workload import HELD_OUT, HeldOutText
from . import corpus

HOME = Path(__file__).parent
SEED = 20
# An original this short lies within gzip's window of 32 KiB when its edited copy is compressed: the copy costs little.
MAX_ORIGINAL_CHARACTERS = 28_000
MIN_ORIGINAL_CHARACTERS, MIN_ORIGINAL_PARAGRAPHS = 6_000, 20


def revisions(held_out: list[corpus.Document], names: list[str]) -> Iterator[HeldOutText]:
    """A revision of the beginning of every document that has enough paragraphs to edit."""
    rng = random.Random(SEED)
    for document in held_out:
        original = document.text[:MAX_ORIGINAL_CHARACTERS].rpartition("\n\n")[0]
        if len(original) < MIN_ORIGINAL_CHARACTERS or original.count("\n\n") < MIN_ORIGINAL_PARAGRAPHS:
            continue
        edited = original
        while edited == original:  # some draws edit nothing
            edited = corpus.revise(original, rng, names)
        text = f"{original}\n\n{edited}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        yield HeldOutText("revision", f"{document.source}/{document.name}", digest, text, len(original))


def held_out_texts(documents: list[corpus.Document]) -> list[HeldOutText]:
    """The held-out documents, then their revisions; revisions rename to the identifiers that training renamed to."""
    held_out = [d for d in documents if d.split == "held_out"]
    names = corpus.identifiers([d for d in documents if d.split == "train"])
    originals = [HeldOutText(d.source, d.name, d.sha256, d.text) for d in held_out]
    return originals + list(revisions(held_out, names))


def write(texts: list[HeldOutText], path: Path) -> None:
    """Gzipped JSON lines; equal texts give equal bytes."""
    lines = []
    for text in texts:
        entry = {key: value for key, value in asdict(text).items() if value is not None}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    path.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))


def main(argv: list[str] | None = None) -> int:
    """Command line: collect, compare with the manifest, write."""
    parser = argparse.ArgumentParser(prog="held_out", description=__doc__)
    parser.add_argument("--manual", type=Path, help="folder of the manual's reST sources")
    arguments = parser.parse_args(argv)
    documents = corpus.collect(arguments.manual or corpus.find_manual())
    corpus.check_manifest(documents, HOME / "CORPUS.json")
    texts = held_out_texts(documents)
    write(texts, HELD_OUT)
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    (HOME / "LICENSE-PSF.txt").write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")
    characters = sum(len(t.text) for t in texts)
    print(f"{HELD_OUT.name}: {len(texts)} texts, {characters:,} characters, {HELD_OUT.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
