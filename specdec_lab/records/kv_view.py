"""What a draft may attend to. Knows neither the cache that is read nor how positions are chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ParseError


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
