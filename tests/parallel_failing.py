"""Rank 1 of a two-process run fails while rank 0 waits for it in a sum; started by torchrun."""

import torch

from specdec_lab.engine.models import parallel

shard, _ = parallel.join(2, torch.device("cpu"))
if shard.rank:
    raise RuntimeError("rank 1 fails here")
torch.distributed.all_reduce(torch.ones(1))
