"""The policy: which configuration to run at which batch and length, with interval and evidence, as one JSON file.

Not known here: who measured it, and which engine runs it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from ..records import DRAFTERS, Cell, Identity, SpecConfig
from . import lookup as rules_of_lookup
from . import reading
from .chooser import Chooser
from .identity import mismatch as identity_mismatch
from .reading import PolicyError, wrong

_T = TypeVar("_T")
SCHEMA = "specdec_lab.policy/1"
STATES = ("tuned", "composed", "infeasible", "not_visited")
DECIDED = ("tuned", "composed")
HOW = ("measured", "composed", "interpolated")
MAX_PORTFOLIO = 32
_HEADER_KEYS = (
    "created", "device", "versions", "base", "target", "drafters", "dtype", "workload", "labels", "objective", "evidence",
)  # fmt: skip
_ROW_KEYS = ("cell", "state", "reason", "config", "speedup", "speedup_ci95", "tokens_per_s", "baseline_tokens_per_s")
_FINGERPRINT = r"[0-9a-f]{12}"


@cache
def policy_schema() -> Mapping[str, Any]:
    """The JSON Schema (2020-12) of a policy file."""
    text = files(__package__).joinpath("schema.json").read_text(encoding="utf-8")
    schema: Mapping[str, Any] = json.loads(text)
    return schema


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one configuration is worth in one cell: speed-up over plain decoding, and how it is known."""

    speedup: float
    ci95: tuple[float, float]
    how: str
    ids: tuple[str, ...] = ()  # of the measurements behind it
    break_even_acceptance_length: float | None = None  # round over plain step: tokens per row a round must yield

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Estimate:
        """Read and check one estimate."""
        data = reading.mapping(data, where)
        reading.only(data, where, ("speedup", "ci95", "how"), ("ids", "break_even_acceptance_length"))
        break_even = data.get("break_even_acceptance_length")
        return cls(
            speedup=reading.positive(data["speedup"], f"{where}.speedup"),
            ci95=reading.interval(data["ci95"], f"{where}.ci95"),
            how=reading.one_of(data["how"], f"{where}.how", HOW),
            ids=reading.texts(data.get("ids", ()), f"{where}.ids"),
            break_even_acceptance_length=None if break_even is None else reading.positive(break_even, f"{where}.break_even"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; what is empty is left out."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in data.items() if value not in (None, ())}


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of the table.

    state    tuned (confirmed by measurement), composed (predicted from parts), infeasible, not_visited
    details  further fields of the row, kept as they are: mean_acceptance_length, num_trials, draft_s, ...
    """

    cell: Cell
    state: str
    reason: str = ""
    config: str | None = None
    speedup: float | None = None
    speedup_ci95: tuple[float, float] | None = None
    tokens_per_s: float | None = None
    baseline_tokens_per_s: float | None = None
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_decided(self) -> bool:
        """Whether this row says what to run."""
        return self.state in DECIDED

    @property
    def why(self) -> str:
        """Why this tree, chain or plain decoding, with the marginal rule in numbers; empty where nobody composed."""
        return str(self.details.get("why", ""))

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Row:
        """Read and check one row."""
        data = reading.mapping(data, where)
        reading.need(data, where, ("cell", "state"))
        cell = Cell.parse(reading.text(data["cell"], f"{where}.cell", r"[1-9][0-9]*x[1-9][0-9]*"))
        state = reading.one_of(data["state"], f"{where}.state", STATES)
        if state in DECIDED:
            reading.need(data, where, ("config", "speedup", "speedup_ci95", "baseline_tokens_per_s", "estimates"))
        elif "config" in data:
            raise wrong(where, f"is {state} and names a config, which nothing has confirmed")

        def read(name: str, reader: Callable[[Any, str], _T]) -> _T | None:
            return reader(data[name], f"{where}.{name}") if name in data else None

        estimates = {
            reading.config(name, f"{where}.estimates"): Estimate.from_dict(value, f"{where}.estimates[{name}]")
            for name, value in reading.mapping(data.get("estimates", {}), f"{where}.estimates").items()
        }
        for name, reader in (("why", reading.text), ("composed", reading.mapping), ("sentinel", reading.mapping)):
            read(name, reader)
        details = {name: value for name, value in data.items() if name not in (*_ROW_KEYS, "estimates")}
        return cls(
            cell,
            state,
            reason=read("reason", reading.text) or "",
            config=read("config", reading.config),
            speedup=read("speedup", reading.positive),
            speedup_ci95=read("speedup_ci95", reading.interval),
            tokens_per_s=read("tokens_per_s", reading.positive),
            baseline_tokens_per_s=read("baseline_tokens_per_s", reading.positive),
            estimates=estimates,
            details=details,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; what is empty is left out."""
        data = {name: getattr(self, name) for name in _ROW_KEYS}
        data["cell"] = str(self.cell)
        data = {name: value for name, value in data.items() if value not in (None, "")}
        if self.estimates or self.is_decided:
            data["estimates"] = {name: estimate.to_dict() for name, estimate in self.estimates.items()}
        return {**self.details, **data}


@dataclass(frozen=True, slots=True)
class Policy:
    """Cell -> configuration with expected speed-up, interval and evidence. Immutable; `lookup` is pure.

    header     what was measured, on what, with which drafters; evidence names the files and their sha256
    rules      the `lookup` object of the file: method, thresholds, what happens outside the grid
    portfolio  the few configurations that may be chosen, `off` among them
    table      one row per cell
    """

    header: Mapping[str, Any]
    rules: rules_of_lookup.Rules
    portfolio: tuple[str, ...]
    table: tuple[Row, ...]
    grid: rules_of_lookup.Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_header(self.header)
        _check_portfolio(self.portfolio, self.header["drafters"])
        _check_table(self.table, self.portfolio)
        object.__setattr__(self, "grid", rules_of_lookup.Grid.of(self.table, self.portfolio))

    @classmethod
    def from_dict(cls, data: Any) -> Policy:
        """Read plain JSON data; PolicyError names the field that is wrong."""
        data = reading.mapping(data, "")
        if data.get("schema") != SCHEMA:
            what = f"this reader knows {SCHEMA}, got {data.get('schema')!r}"
            raise PolicyError("schema", what, "Use the version of specdec_lab that wrote it")
        reading.only(data, "", ("schema", "header", "lookup", "portfolio", "table"))
        portfolio = reading.array(data["portfolio"], "portfolio")
        rows = reading.array(data["table"], "table")
        return cls(
            header=reading.mapping(data["header"], "header"),
            rules=rules_of_lookup.Rules.from_dict(data["lookup"], "lookup"),
            portfolio=tuple(reading.config(name, f"portfolio[{i}]") for i, name in enumerate(portfolio)),
            table=tuple(Row.from_dict(row, f"table[{i}]") for i, row in enumerate(rows)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "schema": SCHEMA,
            "header": dict(self.header),
            "lookup": self.rules.to_dict(),
            "portfolio": list(self.portfolio),
            "table": [row.to_dict() for row in self.table],
        }

    def dumps(self) -> str:
        """The text of the file: sorted keys, 6 significant digits, one byte sequence for one policy."""
        return canonical(self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy file; PolicyError names file, field, reason and what to do."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except OSError as error:
            raise PolicyError("", f"cannot be read: {error.strerror}", "Make one with `specdec-lab tune`", path) from error
        except ValueError as error:
            raise PolicyError("", f"is not JSON: {error}", "The file may be cut off: write it again", path) from None
        try:
            return cls.from_dict(data)
        except PolicyError as error:
            raise error.in_file(path) from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file so that a reader sees the old policy or the new one, never half of it."""
        path = Path(path)
        try:
            _replace(path, self.dumps())
        except OSError as error:
            what = f"cannot be written: {error.strerror}"
            raise PolicyError("", what, "The old file is untouched; free space or choose another place", path) from error
        return path

    def lookup(self, batch: int, length: float) -> SpecConfig:
        """The configuration to run `batch` sequences with at a mean context of `length` tokens. Pure."""
        return SpecConfig.parse(self.choice(batch, length).config)

    def choice(self, batch: int, length: float) -> rules_of_lookup.Choice:
        """What `lookup` answers, with the value of every candidate and the reason."""
        return rules_of_lookup.choose(self.grid, self.rules, batch, length)

    def explain(self, batch: int, length: float) -> str:
        """In words: which measured cells were combined, what every candidate is worth, and why one was chosen."""
        return rules_of_lookup.explain(self.grid, self.rules, batch, length)

    def compile(self, max_batch: int, length_edges: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """`table[batch - 1][bucket]` = index into `portfolio`; bucket i holds edges[i] <= length < edges[i + 1].

        Lengths below edges[0] have no bucket: run `off` there.
        """
        return rules_of_lookup.compile_table(self.grid, self.rules, max_batch, length_edges)

    def mismatch(self, identity: Identity) -> str | None:
        """Why this policy must not be used with `identity`, in words that name the fields; None when it may."""
        return identity_mismatch(self.header, self.drafters, identity)

    def chooser(self, identity: Identity | None = None) -> Chooser:
        """A function (live batch, mean length) -> configuration, with hysteresis and a guard, for one generation.

        With an identity that the policy was not made for it warns once and answers `off` for ever.
        """
        return Chooser(self.grid, self.rules, self.mismatch(identity) if identity else None)

    @property
    def drafters(self) -> tuple[str, ...]:
        """The kinds of drafter that the portfolio uses."""
        used = {SpecConfig.parse(name).drafter for name in self.portfolio}
        return tuple(kind for kind in DRAFTERS if kind in used)

    def headline(self) -> str:
        """One sentence: in how many cells it speculates, and the range of their speed-ups."""
        feasible = [row for row in self.table if row.state != "infeasible"]
        wins = [row.speedup for row in feasible if row.is_decided and row.config != "off" and row.speedup]
        open_cells = sum(row.state == "not_visited" for row in feasible)
        words = f"speculate in {len(wins)} of {len(feasible)} feasible cells"
        ends = list(dict.fromkeys(f"{speedup:.2f}x" for speedup in (min(wins), max(wins)))) if wins else []
        words += f", {' to '.join(ends)}" if ends else ": plain decoding wins everywhere it was measured"
        return words + (f" ({open_cells} not visited)" if open_cells else "")


def _check_header(header: Mapping[str, Any]) -> None:
    reading.need(header, "header", _HEADER_KEYS)
    for name, pattern in (("base", _FINGERPRINT), ("workload", ".+"), ("device", ".+"), ("target", ".+"), ("created", ".*")):
        reading.text(header[name], f"header.{name}", pattern)
    reading.text(header["dtype"], "header.dtype")
    reading.texts(header["labels"], "header.labels")
    reading.mapping(header["versions"], "header.versions")
    reading.one_of(header["objective"], "header.objective", ("tokens_per_s", "tpot_s"))
    for kind, fingerprint in reading.mapping(header["drafters"], "header.drafters").items():
        reading.one_of(kind, "header.drafters", DRAFTERS)
        reading.text(fingerprint, f"header.drafters.{kind}", _FINGERPRINT)
    for i, item in enumerate(reading.array(header["evidence"], "header.evidence")):
        item = reading.mapping(item, f"header.evidence[{i}]")
        reading.need(item, f"header.evidence[{i}]", ("file", "sha256"))
        for name in ("file", "sha256"):
            reading.text(item[name], f"header.evidence[{i}].{name}")


def _check_portfolio(portfolio: Sequence[str], fingerprints: Mapping[str, str]) -> None:
    if "off" not in portfolio:
        raise wrong("portfolio", "lacks 'off', the answer wherever speculation does not pay")
    if len(portfolio) > MAX_PORTFOLIO or len(set(portfolio)) != len(portfolio):
        raise wrong("portfolio", f"must hold at most {MAX_PORTFOLIO} different configurations, got {len(portfolio)}")
    for i, name in enumerate(portfolio):
        kind = SpecConfig.parse(reading.config(name, f"portfolio[{i}]")).drafter
        if kind != "off" and kind not in fingerprints:
            raise wrong(f"portfolio[{i}]", f"uses drafter {kind!r}, which has no fingerprint in header.drafters")


def _check_table(table: Sequence[Row], portfolio: Sequence[str]) -> None:
    cells = [row.cell for row in table]
    if len(set(cells)) != len(cells):
        twice = next(cell for cell in cells if cells.count(cell) > 1)
        raise wrong("table", f"has cell {twice} more than once")
    for i, row in enumerate(table):
        if row.is_decided and row.config not in portfolio:
            raise wrong(f"table[{i}].config", f"{row.config!r} is not in the portfolio")


def canonical(data: Mapping[str, Any]) -> str:
    """JSON text with sorted keys and 6 significant digits: equal data, equal bytes."""
    return json.dumps(_six_digits(data), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _six_digits(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(key): _six_digits(item) for key, item in value.items()}
    return [_six_digits(item) for item in value] if isinstance(value, list | tuple) else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _replace(path: Path, text: str) -> None:
    """Write beside `path`, force to disk, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


