"""All that a tuner may choose, put together from a drafter, a view and a tree."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ParseError
from .kv_view import KvView
from .tree import TreeShape

DRAFTERS = ("self", "model", "ngram")


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
