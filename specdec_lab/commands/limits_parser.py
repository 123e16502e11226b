"""The part of the parser for `limits`. Building it loads nothing heavy."""

from __future__ import annotations

import re

from .parser import Verbs, offer_json
from .spelling import spelled, split_counts

SCALES = {"": 1.0, "g": 1e9, "t": 1e12, "p": 1e15, "gib": 2.0**30}


def quantity(text: str) -> float:
    """`4.3T`, `788T`, `139GiB`, `8e12`: a number above 0 with a decimal prefix, or GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)", text.strip().lower())
    value = float(match[1]) * SCALES.get(match[2], 0.0) if match else 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"a number above 0 is written 4.3T, 788T, 80G or 139GiB, got {text!r}")
    return value


def add_limits(verbs: Verbs) -> None:
    """The verb."""
    verb = verbs.add(
        "limits", "say where speculation can pay at all on a GPU, from its physical limits; modelled, nothing is measured",
        "--shape llama-3.1-8b --draft self:4+508 --alpha 0.8", "--shape llama-3.1-8b --draft model:full --draft-shape draft-1b",
        "--shape my/model/folder --read-bandwidth 3.35T --flops 989T --memory 80G --batches 1,16,64 --lengths 4k,32k",
        handler="limits:limits",
    )
    verb.add_argument("--shape", default="llama-3.1-8b", metavar="NAME",
                      help="llama-3.1-8b (default), llama-2-7b-32k, qwen3-1.7b, draft-1b, or a folder with a config.json")
    verb.add_argument("--machine", default="h200", metavar="NAME", help="h200 (default), h100, a100")
    verb.add_argument("--read-bandwidth", type=spelled(quantity), metavar="B/s", help="instead of the machine's: 4.3T")
    verb.add_argument("--flops", type=spelled(quantity), metavar="FLOP/s",
                      help="of 16-bit products, instead of the machine's: 788T")
    verb.add_argument("--memory", type=spelled(quantity), metavar="BYTES", help="instead of the machine's: 139GiB")
    verb.add_argument("--batches", type=spelled(split_counts), default=(1, 8, 32, 64, 128), metavar="N,...",
                      help="default: 1,8,32,64,128")
    verb.add_argument("--lengths", type=spelled(split_counts), default=(1024, 4096, 16384, 32768, 131072), metavar="N,...",
                      help="default: 1k,4k,16k,32k,128k")
    verb.add_argument("--draft", default="self:4+508", metavar="DRAFTER:VIEW",
                      help="self:4+508 (default), model:full, model:4+252, ngram")
    verb.add_argument("--draft-shape", metavar="NAME", help="of `model` drafts: draft-1b, or a folder")
    verb.add_argument("--alpha", type=float, default=0.8, metavar="P",
                      help="chance that a drafted token is accepted; assumed, not known (default: 0.8)")
    verb.add_argument("--out", metavar="FILE", help="write the picture here, .html")
    offer_json(verb)
