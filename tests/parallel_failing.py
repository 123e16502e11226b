"""Rank 1 of a two-process run ends while rank 0 waits for it, each time in another way."""

import sys

import torch

import specdec_lab as sd
from specdec_lab.cli import main
from specdec_lab.engine.models import parallel


def fault():
    """An error of a program that is not ours."""
    shard, _ = parallel.join(2, torch.device("cpu"))
    if shard.rank:
        raise RuntimeError("rank 1 fails here")
    torch.distributed.all_reduce(torch.ones(1))


def exits():
    """A script's own clean end with words."""
    shard, group = parallel.join(2, torch.device("cpu"))
    group.sum(torch.ones(1))
    if shard.rank:
        raise SystemExit("rank 1 has nothing to read")
    group.sum(torch.ones(1))


def mistake():
    """What a user can mend, on one rank's machine only: the other is on its way into the group."""

    def load(*names, **options):
        return sd.load("random:nobody" if parallel.os.environ["RANK"] == "1" else names[0], **options)

    words = "run --model random:tiny --tensor-parallel 2 --device cpu --workload random --cell 1x64"
    sys.exit(main(words.split(), load=load))


if __name__ == "__main__":
    {"fault": fault, "exits": exits, "mistake": mistake}[sys.argv[1]]()
