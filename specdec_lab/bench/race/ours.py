"""Our engine as peers: plain decoding, configurations, a policy. They share one session, so prompts are read once for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...costs import Limits, counted_floor
from ...engine.cache import CacheTooLarge
from ...records import Cell, SpecConfig, StepRecord, UnsupportedConfig
from ...workload import Workload
from .peer import Decoded, PeerFailed, Rows, Stopwatch

if TYPE_CHECKING:
    from ...engine.loop import Engine, OpenSession
    from ...policy import Policy

GROUP = "ours"
PLAIN = f"{GROUP}/off"


class SharedSession:
    """The open session of the prompts that were asked for last."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._key: tuple[Any, ...] | None = None
        self._session: OpenSession | None = None

    def open(self, prompts: Rows, new_tokens: int) -> OpenSession:
        """The session at the end of these prompts; PeerFailed where its cache does not fit."""
        key = tuple(map(tuple, prompts)), new_tokens
        if self._session is None or key != self._key:
            self.close()
            workload = Workload("race", key[0], new_tokens, stop_at_eos=False)
            try:
                self._session, self._key = self.engine.open(workload), key
            except (CacheTooLarge, ValueError) as error:
                raise PeerFailed(str(error)) from error
        return self._session

    def close(self) -> None:
        """Free the caches."""
        self._session = self._key = None


class OurPeer:
    """One configuration, or a policy, of our engine.

    choose  a SpecConfig, or a Policy; `name` is what the row is called
    """

    goes_last = False

    def __init__(self, shared: SharedSession, choose: SpecConfig | Policy, name: str = "") -> None:
        self.name = name or f"{GROUP}/{choose}"
        self._shared, self._choose = shared, choose
        self._session: OpenSession | None = None
        self._header: dict[str, Any] = {}
        self._chosen: set[str] = set()
        rates = shared.engine.ceilings
        self._limits = Limits(rates.read_bytes_per_s, rates.gemm_flops_per_s)

    def why_not(self, cell: Cell) -> str | None:
        if not isinstance(self._choose, SpecConfig):
            return self._choose.mismatch(self._shared.engine.identity())
        try:
            self._shared.engine.open(Workload("check", ((0,),), 1)).steps(self._choose)
        except UnsupportedConfig as error:
            return str(error)
        return None

    def settings(self) -> dict[str, Any]:
        engine = self._shared.engine
        chosen = {"configurations": sorted(self._chosen)} if not isinstance(self._choose, SpecConfig) else {}
        return {
            **self._header, **chosen, "threads": engine.identity().base["threads"], "instrumented": engine.instrument,
            "timed": "from asking for the first token, the rewind to the end of the prompts included",
        }  # fmt: skip

    def prepare(self, prompts: Rows, new_tokens: int) -> float:
        self._session = self._shared.open(prompts, new_tokens)
        prefill_s = 0.0
        with self._session.steps(self._choose) as stream:
            header = stream.header
            self._header = {
                "backend": header.backend, "runner": header.target["runner"], "dtype": header.target["dtype"],
                "kv_dtype": header.target["dtype"], "labels": list(header.labels),
            }  # fmt: skip
            for step in stream:
                if step.kind == "round":
                    break
                prefill_s += step.wall_s
        return prefill_s

    def decode(self) -> Decoded:
        if self._session is None:
            raise PeerFailed(f"{self.name} was asked to decode before its prompts were read")
        with Stopwatch() as watch, self._session.steps(self._choose) as stream:
            steps = list(stream)
        self._chosen |= {step.config for step in steps}
        tokens: Rows = [[token for step in steps for token in step.tokens[row]] for row in range(steps[0].batch)]
        rounds = sum(sum(step.live) for step in steps)
        extra = {"cpu_s": watch.cpu_s, "floor_s": self._floor_s(steps)}
        if self.name != PLAIN:
            extra["tokens_per_round"] = sum(map(len, tokens)) / rounds
        return Decoded(tokens, watch.seconds, extra)

    def _floor_s(self, steps: list[StepRecord]) -> float:
        """The least time that the bytes and FLOPs of these rounds could take here (modelled)."""
        return sum(
            counted_floor(
                self._limits, weight_bytes=s.weight_bytes, kv_bytes=s.kv_read_bytes + s.draft_kv_read_bytes,
                linear_flops=s.linear_flops, attention_flops=s.attention_flops,
            ).total_s
            for s in steps
        )  # fmt: skip

    def close(self) -> None:
        self._session = None
        self._shared.close()
