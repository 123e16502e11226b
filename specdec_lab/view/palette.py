"""The colours and the words of the four families in which the time of a round is drawn.

Chosen for the largest minimum difference under normal, protan, deutan and tritan sight. The front end repeats these values
(a test compares them).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """One layer of the stack; `modelled` layers are drawn hatched."""

    key: str
    label: str
    colour: str
    meaning: str
    modelled: bool = False


KV = Family("kv", "KV floor (modelled)", "#CC3311", "bytes of KV read by verify / measured read bandwidth", modelled=True)
COMPUTE = Family("compute", "compute", "#0077BB", "verify: linear layers, and attention beyond the KV floor")
DRAFT = Family("draft", "draft", "#E69F00", "all of drafting")
OTHER = Family("other", "other", "#8A8A8A", "commit (append + compact), sampling + accept, host gap")

FAMILIES = (KV, COMPUTE, DRAFT, OTHER)  # from the bottom of the stack
AMBER_OUTLINE = "#8A5F00"  # amber alone has too little contrast on white
