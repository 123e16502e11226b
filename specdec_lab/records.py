"""The nouns: cells, configurations, step records, run headers, runs, summaries.

Every noun is a frozen dataclass that checks itself when made, and every noun that a user types has one text spelling,
used by magics, command line, JSON, Optuna and labels alike: `X.parse(str(x)) == x`. This module knows the standard
library only: not torch, not the engine, not the view.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

STEP_SCHEMA = "specdec_lab.run/1"
MAX_NODES = 767  # drafted nodes; with the root, the largest tree that Sequoia published has 768
MAX_DEPTH = 64
DRAFTERS = ("self", "model", "ngram")

# Labels of numbers that are not those of a trained model on real text. The first and the last are followed by more words.
FORCED, RANDOM_WEIGHTS, RANDOM_CONTEXT, MODELLED, ONE_SHARD = (
    "acceptance: forced", "random-weights", "random context", "modelled", "one shard of "
)  # fmt: skip


def forced_label(labels: Iterable[str]) -> str | None:
    """The label of forced acceptance among these, if there is one."""
    return next((label for label in labels if label.startswith(FORCED) or label == "forced"), None)


def not_measured(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels that say: this is not a trained model on real text, a server must not run on it."""
    whole = ("forced", RANDOM_WEIGHTS, RANDOM_CONTEXT, MODELLED)
    return tuple(label for label in labels if label in whole or label.startswith((FORCED, ONE_SHARD)))


class ParseError(ValueError):
    """A spelling that is not one of ours; the message quotes it, says where it fails and what is expected."""


class UnsupportedConfig(ValueError):
    """A configuration that is well spelled and that this engine, model or machine cannot run; the message says why."""


def _count(text: str, what: str) -> int:
    """A token count: 512, 4k or 4K (1024 each)."""
    match = re.fullmatch(r"(\d+)([kK]?)", text)
    if match is None:
        raise ParseError(f"{what} must be a whole number such as 512 or 4k, got {text!r}")
    return int(match[1]) * (1024 if match[2] else 1)


def parse_count(text: str) -> int:
    """A positive token or sequence count as typed by a user: `512`, `4k` (= 4096)."""
    value = _count(text.strip(), "a count")
    if value < 1:
        raise ParseError(f"a count must be at least 1, got {text!r}")
    return value


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """The key of tuning: sequences in the batch, tokens of context each. Spelled `8x4096`."""

    batch: int
    length: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1:
            raise ValueError(f"Cell needs a batch and a length of at least 1, got {self.batch}x{self.length}")

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read `8x4096` or `8x4k`."""
        parts = text.strip().lower().split("x")
        if len(parts) != 2:
            raise ParseError(f"cell {text!r} is not of the form BATCHxLENGTH, for example 8x4096 or 8x4k")
        try:
            return cls(_count(parts[0], "the batch"), _count(parts[1], "the length"))
        except ValueError as error:
            raise ParseError(f"cell {text!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class KvView:
    """What a draft may attend to. `full`, `4+508` (sink + recent), `snapkv1024+32`, `snapkv1024+32r64`.

    sink, recent  tokens at the start, and the last tokens (the drafting token itself included), of a window
    budget        positions kept from the prompt by SnapKV (Li 2024), beside `recent`
    refresh       tokens between re-selections of SnapKV, 0 = never
    """

    kind: str
    sink: int = 0
    recent: int = 0
    budget: int = 0
    refresh: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("full", "window", "snapkv"):
            raise ValueError(f"KvView.kind must be full, window or snapkv, got {self.kind!r}")
        if min(self.sink, self.recent, self.budget, self.refresh) < 0:
            raise ValueError(f"KvView counts must not be negative, got {self!r}")
        spelled = {"full": (), "window": ("sink", "recent"), "snapkv": ("recent", "budget", "refresh")}[self.kind]
        if stray := [n for n in ("sink", "recent", "budget", "refresh") if n not in spelled and getattr(self, n)]:
            raise ValueError(f"KvView of kind {self.kind} has no {', '.join(stray)}, got {self!r}")
        if self.kind != "full" and self.recent < 1:
            raise ValueError(
                f"KvView.recent must be at least 1 token (the drafting token sees itself), got {self.recent}"
            )
        if self.kind == "snapkv" and self.budget < 1:
            raise ValueError(f"KvView.budget of snapkv must be at least 1 token, got {self.budget}")

    @classmethod
    def full(cls) -> KvView:
        """All committed tokens."""
        return cls("full")

    @classmethod
    def window(cls, sink: int, recent: int) -> KvView:
        """The first `sink` and the last `recent` tokens (StreamingLLM, Xiao 2023)."""
        return cls("window", sink=sink, recent=recent)

    @classmethod
    def snapkv(cls, budget: int, recent: int, refresh: int = 0) -> KvView:
        """`budget` prompt tokens chosen by the last prompt queries, and the last `recent` tokens."""
        return cls("snapkv", recent=recent, budget=budget, refresh=refresh)

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that one query reads through this view; None when it grows with the context."""
        return None if self.kind == "full" else self.sink + self.recent + self.budget

    def __str__(self) -> str:
        if self.kind == "full":
            return "full"
        if self.kind == "window":
            return f"{self.sink}+{self.recent}"
        return f"snapkv{self.budget}+{self.recent}" + (f"r{self.refresh}" if self.refresh else "")

    @classmethod
    def parse(cls, text: str) -> KvView:
        """Read `full`, `4+508`, `snapkv1024+32` or `snapkv1024+32r64`."""
        if text == "full":
            return cls.full()
        if match := re.fullmatch(r"(\d+)\+(\d+)", text):
            return cls.window(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"snapkv(\d+)\+(\d+)(?:r(\d+))?", text):
            return cls.snapkv(int(match[1]), int(match[2]), int(match[3] or 0))
        raise ParseError(f"view {text!r} is none of: full, SINK+RECENT (4+508), snapkvBUDGET+RECENT (snapkv1024+32)")


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The drafted nodes of a round; the root (the last emitted token, index -1) is not one of them.

    parents  parents[i] < i is the node under which node i hangs. Papers count the root: their (n nodes, D levels) is
             our (n-1 nodes, depth D-1). Spelled `chain5`, `4,2,1` (children per node, by level) or `tree:-1,-1,0`.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents:
            raise ValueError("TreeShape needs at least 1 drafted node; to draft nothing use the configuration 'off'")
        if len(self.parents) > MAX_NODES:
            raise ValueError(f"TreeShape has {len(self.parents)} nodes; at most {MAX_NODES} can be verified in a round")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"TreeShape node {node} has parent {parent}; it must be -1 (root) or an earlier node")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"TreeShape is {self.depth} levels deep; at most {MAX_DEPTH} are possible")

    @classmethod
    def chain(cls, length: int) -> TreeShape:
        """A path of `length` drafted tokens."""
        return cls(tuple(range(-1, length - 1)))

    @classmethod
    def branching(cls, children: Sequence[int]) -> TreeShape:
        """Breadth-first tree in which every node of level l has children[l] children."""
        if any(c < 1 for c in children):
            raise ValueError(f"every level of a tree needs at least 1 child per node, got {list(children)}")
        parents: list[int] = []
        level = [-1]
        for width in children:
            if len(parents) + len(level) * width > MAX_NODES:
                raise ValueError(f"tree {','.join(map(str, children))} has more than {MAX_NODES} nodes")
            first = len(parents)
            parents += [node for node in level for _ in range(width)]
            level = list(range(first, len(parents)))
        return cls(tuple(parents))

    @property
    def num_nodes(self) -> int:
        """Drafted nodes, root not counted."""
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node; children of the root have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """The longest path, in drafted tokens."""
        return max(self.depths)

    @property
    def is_chain(self) -> bool:
        """Whether every node has at most one child and the root exactly one."""
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    def children_per_level(self) -> tuple[int, ...] | None:
        """The level-by-level branching if the tree is that regular, else None."""
        counts = [0] * (len(self.parents) + 1)
        for parent in self.parents:
            counts[parent + 1] += 1
        depths = (0, *self.depths)
        per_level: list[int] = []
        for level in range(self.depth):
            widths = {counts[i] for i, d in enumerate(depths) if d == level}
            if len(widths) != 1:
                return None
            per_level.append(widths.pop())
        return tuple(per_level) if TreeShape.branching(per_level).parents == self.parents else None

    def __str__(self) -> str:
        if self.is_chain:
            return f"chain{len(self.parents)}"
        regular = self.children_per_level()
        return ",".join(map(str, regular)) if regular else "tree:" + ",".join(map(str, self.parents))

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """Read `chain5`, `4,2,1` or `tree:-1,-1,0`."""
        if match := re.fullmatch(r"chain(\d+)", text):
            length = int(match[1])
            if not 1 <= length <= MAX_DEPTH:
                raise ParseError(f"tree {text!r}: a chain has 1 to {MAX_DEPTH} drafted tokens, got {length}")
            return cls.chain(length)
        if match := re.fullmatch(r"tree:(-?\d+(?:,-?\d+)*)", text):
            return cls(tuple(int(p) for p in match[1].split(",")))
        if re.fullmatch(r"\d+(,\d+)*", text):
            return cls.branching([int(c) for c in text.split(",")])
        raise ParseError(f"tree {text!r} is none of: chainN (chain5), children per level (4,2,1), tree:PARENTS")


@dataclass(frozen=True, slots=True)
class SpecConfig:
    """All that a tuner may choose: who drafts, what it sees, which tree it drafts. `off` is plain decoding.

    Spelled `self:4+508/chain5`, `model:full/4,2,1`, `ngram/chain8`, `off`.
    """

    drafter: str
    view: KvView | None = None
    tree: TreeShape | None = None

    def __post_init__(self) -> None:
        if self.drafter == "off":
            if self.view is not None or self.tree is not None:
                raise ValueError("SpecConfig 'off' takes neither a view nor a tree")
            return
        if self.drafter not in DRAFTERS:
            raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)} or off, got {self.drafter!r}")
        if self.tree is None:
            raise ValueError(f"drafter {self.drafter!r} needs a tree, for example chain3")
        if (self.drafter == "ngram") != (self.view is None):
            raise ValueError(
                "ngram reads no KV and takes no view: write ngram/chain8" if self.drafter == "ngram"
                else f"drafter {self.drafter!r} needs a view, for example {self.drafter}:4+60/chain3"
            )

    @classmethod
    def off(cls) -> SpecConfig:
        """Plain decoding."""
        return cls("off")

    @property
    def is_off(self) -> bool:
        """Whether this is plain decoding."""
        return self.drafter == "off"

    @property
    def is_chain(self) -> bool:
        """Whether it drafts one token after the other; plain decoding does not."""
        return self.tree is not None and self.tree.is_chain

    @property
    def depth(self) -> int:
        """Longest drafted path; 0 for plain decoding."""
        return self.tree.depth if self.tree else 0

    @property
    def num_nodes(self) -> int:
        """Drafted nodes; 0 for plain decoding."""
        return self.tree.num_nodes if self.tree else 0

    def __str__(self) -> str:
        if self.is_off:
            return "off"
        return f"{self.drafter}{'' if self.view is None else f':{self.view}'}/{self.tree}"

    @classmethod
    def parse(cls, text: str) -> SpecConfig:
        """Read a spelling; ParseError says which part, at which column, is wrong."""
        text = text.strip()
        if text == "off":
            return cls.off()
        head, slash, tree = text.partition("/")
        drafter, colon, view = head.partition(":")
        if drafter not in DRAFTERS:
            raise ParseError(f"config {text!r}, column 1: drafter {drafter!r} is none of off, {', '.join(DRAFTERS)}")
        if not slash:
            raise ParseError(f"config {text!r}: the tree is missing; write for example {head}/chain3")
        try:
            where = len(drafter) + 2
            parsed_view = KvView.parse(view) if colon else None
            where = len(head) + 2
            parsed_tree = TreeShape.parse(tree)
            where = 1
            return cls(drafter, parsed_view, parsed_tree)
        except ValueError as error:
            raise ParseError(f"config {text!r}, column {where}: {error}") from None


FELL_BACK = "fell back"  # how the flag begins that the first round after a live fall-back carries; "from CONFIG" follows

# The measured parts of a round, in the order in which they are stacked. They sum to wall_s.
PHASES = ("draft_s", "linear_s", "attention_s", "commit_s", "accept_s", "host_s")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One draft-verify-commit round of one batch, or the prefill of a turn. Times are measured, in seconds.

    Per-sequence fields are tuples with one entry per row of the batch; a finished row has emitted nothing.
    `verify_s = linear_s + attention_s`. `kv_floor_s` is modelled: bytes over the calibrated read bandwidth.
    """

    index: int
    kind: str  # "prefill" or "round"
    config: str
    start_s: float  # since the start of the run, waiting of the consumer not counted
    wall_s: float
    draft_s: float
    linear_s: float
    attention_s: float
    commit_s: float
    accept_s: float
    host_s: float
    cpu_s: float  # thread CPU time of the engine's thread; wall far above it means a busy machine
    context_tokens: tuple[int, ...]  # committed KV length before the step
    drafted: tuple[int, ...]  # drafted nodes per row
    accepted: tuple[int, ...]  # accepted and emitted draft tokens, bonus not counted
    tokens: tuple[tuple[int, ...], ...]  # emitted tokens, bonus included
    censored: tuple[bool, ...]  # cut by end of text or length limit: neither accepted nor rejected
    ranks: tuple[tuple[int, ...], ...] = ()  # trees: per row which child (1 = first) was accepted at each depth
    nodes: tuple[tuple[int, ...], ...] = ()  # trees: which nodes each row drafted, where some row drafted fewer than all
    draft_linear_s: float = 0.0
    draft_attention_s: float = 0.0
    draft_kv_floor_s: float = 0.0
    kv_floor_s: float = 0.0
    kv_read_bytes: int = 0  # verify
    draft_kv_read_bytes: int = 0
    kv_write_bytes: int = 0
    weight_bytes: int = 0  # read by verify and draft forwards together
    linear_flops: int = 0
    attention_flops: int = 0
    query_tokens: int = 0  # per sequence in the verify forward, root counted
    draft_threads: int = 0  # of draft forwards and of verify on a CPU, as measured to be fastest; 0 where it means nothing
    verify_threads: int = 0
    context_cost_s: float | None = None  # sampled: step(n) - step(tiny n)
    flags: tuple[str, ...] = ()  # "busy", "floor-above-measured", "fell back from CONFIG"

    def __post_init__(self) -> None:
        if self.kind not in ("prefill", "round"):
            raise ValueError(f"StepRecord.kind must be prefill or round, got {self.kind!r}")
        rows = len(self.context_tokens)
        for name in ("drafted", "accepted", "tokens", "censored"):
            if len(getattr(self, name)) != rows:
                raise ValueError(f"StepRecord.{name} has {len(getattr(self, name))} entries for a batch of {rows}")
        for name in ("ranks", "nodes"):
            counts = self.accepted if name == "ranks" else self.drafted
            if (given := getattr(self, name)) and tuple(map(len, given)) != tuple(counts):
                raise ValueError(f"StepRecord.{name} {given} does not fit the counts {tuple(counts)} of its rows")
        if self.kind == "round":
            for row, (drafted, accepted) in enumerate(zip(self.drafted, self.accepted, strict=True)):
                if not 0 <= accepted <= drafted:
                    raise ValueError(f"row {row} accepted {accepted} of {drafted} drafted tokens")
        for name in ("wall_s", *PHASES):
            if getattr(self, name) < 0:
                raise ValueError(f"StepRecord.{name} is negative: {getattr(self, name)}")

    @property
    def verify_s(self) -> float:
        """Time of the target's forward."""
        return self.linear_s + self.attention_s

    @property
    def batch(self) -> int:
        """Rows of the batch, finished ones included."""
        return len(self.context_tokens)

    @property
    def live(self) -> tuple[bool, ...]:
        """Which rows emitted something in this step."""
        return tuple(bool(t) for t in self.tokens)

    @property
    def num_emitted(self) -> int:
        """Tokens emitted by all rows, bonus included."""
        return sum(len(t) for t in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; defaults are left out to keep traces small."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepRecord:
        """The inverse of to_dict; unknown keys of newer writers are ignored, missing ones raise ValueError."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        try:
            for name in ("context_tokens", "drafted", "accepted", "censored", "flags"):
                if name in values:
                    values[name] = tuple(values[name])
            for name in ("tokens", "ranks", "nodes"):
                if name in values:
                    values[name] = tuple(tuple(t) for t in values[name])
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a step record: {error}") from None


def fingerprint(exact: Mapping[str, Any]) -> str:
    """12 hex digits of the sha256 of the canonical JSON of `exact`."""
    text = json.dumps(exact, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a measurement depends on exactly: machine and target (base), and each drafter that is loaded.

    device   normalised name, `NVIDIA_H200` or `AMD_EPYC_2t`
    base     device, count, target config and weights hash, dtypes, runner, back end, threads, engine version
    drafters kind -> exact fields; holds "self" and "ngram" always, "model" when a draft is loaded
    warn     driver, torch patch, corpus hash: a difference makes a record stale, not foreign
    """

    device: str
    base: Mapping[str, Any]
    drafters: Mapping[str, Mapping[str, Any]]
    warn: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_fingerprint(self) -> str:
        """12 hex digits over the base fields."""
        return fingerprint(self.base)

    def drafter_fingerprint(self, kind: str) -> str:
        """12 hex digits over a drafter's fields; zeros for off. KeyError when that drafter is not loaded."""
        return "0" * 12 if kind == "off" else fingerprint(self.drafters[kind])

    def of(self, config: SpecConfig) -> str:
        """`base.drafter`, the key under which measurements of `config` may be pooled."""
        return f"{self.base_fingerprint}.{self.drafter_fingerprint(config.drafter)}"


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What a number needs to be believed: what ran, on what, with which model, versions and ceilings."""

    run_id: str
    created: str  # UTC, ISO 8601
    cell: Cell  # the batch, and the mean prompt length
    config: str  # a SpecConfig spelling, or "policy:<name>" / "function"
    workload: str
    target: Mapping[str, Any]  # name, fingerprint, runner, parameters, weight_bytes, kv_bytes_per_token, dtype
    draft: Mapping[str, Any] | None
    backend: str
    refused: Mapping[str, str]  # back end -> why it was passed over
    machine: Mapping[str, Any]  # device, cores, threads, memory_bytes, last_level_cache_bytes
    versions: Mapping[str, str]
    commit: str
    seed: int
    temperature: float
    verifier: str
    instrumented: bool
    ceilings: Mapping[str, float]  # read_bytes_per_s, gemm_flops_per_s
    labels: tuple[str, ...] = ()  # "forced", "random-weights", "modelled", "KV fits in cache", ...
    block: int | None = None  # blocks of one number ran interleaved and are compared with each other
    schema: str = STEP_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "cell": str(self.cell), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunHeader:
        """The inverse of to_dict; a header of another schema raises ValueError."""
        if data.get("schema") != STEP_SCHEMA:
            raise ValueError(f"this reader knows {STEP_SCHEMA}; the header says {data.get('schema')!r}")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        values["cell"] = Cell.parse(values.get("cell", ""))
        values["labels"] = tuple(values.get("labels", ()))
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a run header: {error}") from None


@dataclass(frozen=True, slots=True)
class Run:
    """A finished stream: its header and all its steps."""

    header: RunHeader
    steps: tuple[StepRecord, ...]
    interrupted: bool = False

    @property
    def rounds(self) -> tuple[StepRecord, ...]:
        """The steps that are draft-verify-commit rounds."""
        return tuple(s for s in self.steps if s.kind == "round")

    def tokens(self) -> list[list[int]]:
        """New tokens per row, in order."""
        rows: list[list[int]] = [[] for _ in range(self.header.cell.batch)]
        for step in self.steps:
            for row, emitted in zip(rows, step.tokens, strict=True):
                row.extend(emitted)
        return rows


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of a per-step quantity with its 5th and 95th percentile and its count."""

    median: float
    p05: float
    p95: float
    count: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The metrics of a run, named as vLLM names them (engines.md section 4). Lengths include the bonus token.

    Acceptance statistics leave censored rows out. `parts_s` are mean seconds per round of each phase.
    """

    config: str
    num_spec_steps: int  # row-rounds that drafted
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_emitted_tokens: int  # of rounds, prefill not counted
    mean_acceptance_length: float
    draft_acceptance_rate: float | None
    acceptance_histogram: tuple[int, ...]
    acceptance_rate_per_pos: tuple[float, ...]
    conditional_acceptance: tuple[float, ...]
    step_s: Spread
    tokens_per_s: float
    tokens_per_s_spread: Spread
    parts_s: Mapping[str, float]
    prefill_s: float
    kv_read_bytes: float  # mean per round, verify and draft
    kv_floor_share: float | None  # KV floor of verify over measured attention
    kv_read_bytes_per_s: float | None  # verify bytes over measured attention
    busy_steps: int
    labels: tuple[str, ...] = field(default=())
    rank_acceptance: tuple[float, ...] = ()  # chance that the k-th child of an accepted node is accepted, over all depths

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)
