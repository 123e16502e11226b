"""How the shards of a model meet: sums and gathers over ranks, on devices and among hosts.

What devices do together is in place on tensors that a captured graph may hold, asks the host nothing, and is the same code
for NCCL and for gloo. **Ranks decide alike by construction.** A sum may differ in its last bits from rank to rank, for NCCL
promises no order; so may a draft network that every rank holds, and kernels on unlike GPUs. Logits of shards do not: each is
computed by one rank and copied to all. Yet nobody has to rely on that: in rounds on the device every choice made of logits is
the first rank's, sent to all (`of_first`: a few integers per forward, beside two sums per layer). What follows from choices,
lengths, live rows, flights, is then the same everywhere. Rounds on the host check it instead (`check_equal`). Not known here:
what is decided.
"""

from __future__ import annotations

import datetime
import gc
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .meeting import Meeting, meeting

if TYPE_CHECKING:
    from ..ranks import Orders

FOREVER = datetime.timedelta(days=7)  # a leader may think for long; that it is gone is noticed elsewhere (meeting.py)


class Group(Protocol):
    """How shards meet.

    words   for a header: how many, by which means
    orders  of a rank that leads the others (engine/ranks.py); None where all run the same program
    """

    ranks: int
    words: str
    orders: Orders | None

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over all ranks of a tensor of one shape, which may be overwritten."""

    def gather(self, part: Tensor) -> Tensor:
        """The last dimension of all ranks, one after the other."""

    def of_first(self, chosen: Tensor) -> Tensor:
        """What the first rank has there."""

    def check_equal(self, decided: Tensor) -> None:
        """Raise RanksDisagree unless all ranks decided the same."""

    def same(self, words: str) -> str:
        """What the first rank says; hosts only."""

    def why_not_captured(self) -> str | None:
        """None if a CUDA graph may hold sums of this group, else the reason in words."""

    def replays(self) -> None:
        """Call before a graph that holds sums is replayed."""

    def keep(self, graph: Any) -> None:
        """A graph that holds sums: it must end before the group does."""


class RanksDisagree(RuntimeError):
    """The ranks of a model decided differently: from here on their caches hold different texts."""


class Alone:
    """One shard without the others, for timing: sums stay partial, its logits stand for all. Tokens mean nothing."""

    orders: Orders | None = None

    def __init__(self, ranks: int) -> None:
        self.ranks, self.words = ranks, f"one shard of {ranks}, sums left out"

    def sum(self, partial: Tensor) -> Tensor:
        """As it is."""
        return partial

    def gather(self, part: Tensor) -> Tensor:
        """Repeated: as wide as the vocabulary."""
        return torch.cat([part] * self.ranks, -1)

    def of_first(self, chosen: Tensor) -> Tensor:
        """There is nobody else."""
        return chosen

    def check_equal(self, decided: Tensor) -> None:
        """There is nobody to differ from."""

    def same(self, words: str) -> str:
        """There is nobody else."""
        return words

    def why_not_captured(self) -> str | None:
        """It can."""
        return None

    def replays(self) -> None:
        """Needs nobody."""

    def keep(self, graph: Any) -> None:
        """Ends when it likes."""


class Processes:
    """The ranks of torch.distributed, one process each; hosts talk over gloo."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.orders: Orders | None = None
        self._backend = torch.distributed.get_backend()
        self.words = f"{ranks} ranks over {self._backend}"
        self.hosts = torch.distributed.new_group(backend="gloo", timeout=FOREVER)
        self._meeting: Meeting | None = meeting()
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        if self._meeting is not None:
            self._meeting.after_leaving(self._part)

    def _met(self, kind: str = "sum") -> None:
        if self._meeting is not None:
            self._meeting.met(kind)

    def sum(self, partial: Tensor) -> Tensor:
        """All-reduce, in place."""
        self._met()
        torch.distributed.all_reduce(partial)
        return partial

    def gather(self, part: Tensor) -> Tensor:
        """All-gather, then the parts side by side."""
        self._met()
        rows = part.reshape(-1, part.shape[-1])
        made = rows.new_empty(self.ranks * rows.shape[0], rows.shape[1])
        _gather_into(made, rows)
        whole = made.view(self.ranks, *rows.shape).transpose(0, 1)  # [rows, ranks, width]
        return whole.reshape(*part.shape[:-1], self.ranks * part.shape[-1])

    def of_first(self, chosen: Tensor) -> Tensor:
        """Broadcast."""
        self._met()
        agreed = chosen.contiguous()
        torch.distributed.broadcast(agreed, 0)
        return agreed

    def check_equal(self, decided: Tensor) -> None:
        """See Group.check_equal."""
        first = self.of_first(decided.clone())
        if not torch.equal(first, decided):
            raise RanksDisagree(f"rank {torch.distributed.get_rank()} decided {decided.tolist()}, rank 0 {first.tolist()}; "
                                "their results of one forward differ, so this machine's sums over ranks are not reproducible")

    def same(self, words: str) -> str:
        """From host to host: no device waits. A leader is the only one that asks."""
        return words if self.orders is not None else str(self.tell(words))

    def tell(self, message: Any = None) -> Any:
        """What the first rank hands over to the hosts of all."""
        self._met("order")
        box = [message]
        torch.distributed.broadcast_object_list(box, 0, group=self.hosts, device=torch.device("cpu"))
        return box[0]

    def hear_all(self, words: str) -> list[str]:
        """What every rank's host says."""
        self._met("order")
        said: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(said, words, group=self.hosts)
        return said

    def why_not_captured(self) -> str | None:
        """NCCL alone works on the device."""
        return None if self._backend == "nccl" else f"sums over ranks by {self._backend} wait for the host"

    def replays(self) -> None:
        """A replay meets the others as often as its graph says; once is enough to know who waits for whom."""
        self._met()

    def keep(self, graph: Any) -> None:
        """NCCL waits for its graphs before it ends, for ever if need be."""
        self._graphs.add(graph)

    def _part(self) -> None:
        for graph in list(self._graphs):
            graph.reset()
        gc.collect()
        torch.distributed.destroy_process_group()


def _gather_into(whole: Tensor, part: Tensor) -> None:
    """Newer torch has another name for it, and warns of the older one."""
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    gather(whole, part.contiguous())
