"""`python -m specdec_lab.bench.gpu STAGE ...`: one stage in this process, as `run.apart` starts it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import session
from .plan import NAMES, chosen
from .run import here


def main(words: Sequence[str]) -> int:
    """0 whatever the stage's end, which is in the ledger."""
    parser = argparse.ArgumentParser(prog="python -m specdec_lab.bench.gpu", description=__doc__)
    parser.add_argument("stage", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--gpt-fast", type=Path)
    given = parser.parse_args(words)
    (stage,) = chosen((given.stage,))
    here(stage, session.gpu_context(given.out, given.run, given.seconds, _say, given.gpt_fast))
    return 0


def _say(line: str) -> None:
    """The output stream belongs to whoever started this process."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
