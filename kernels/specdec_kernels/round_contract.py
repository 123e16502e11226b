"""Every small kernel of a round as a launch would compile it, for GPUs that are not here. See contract.py.

Sizes are Llama-3.1-8B's: 32 query heads and 8 KV heads of 128, a vocabulary of 128,256.
`python -m specdec_kernels.round_contract` compiles all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .accept import gpu as accept
from .contract import Compiled, compile_kernel, report
from .kv_compact import gpu as compact_tiles
from .ngram import gpu as ngram_tiles
from .noise import gpu as noise_tiles
from .rope_append import gpu as rope_tiles
from .row_lse import gpu as row_tiles
from .sample_rows import gpu as sample_tiles

VOCABULARY, DIM, HEADS, KV_HEADS = 128256, 128, 32, 8

# pointers that are not int32, by argument name, where every kernel means the same by it
POINTERS = {
    **dict.fromkeys(("seed", "refused", "best", "tokens", "texts", "lengths", "join", "num_tokens"), "*i64"),
    **dict.fromkeys(("offered_mass", "rest_mass", "sums"), "*fp64"),
    **dict.fromkeys(("cos", "sin", "lse", "best_value", "logprob", "target_logprob", "draft_logprob"), "*fp32"),
    **dict.fromkeys(("target_lse", "draft_lse", "law", "quick", "highest", "total"), "*fp32"), "exists": "*i1",
}  # fmt: skip
INT32 = (
    "sequences", "positions", "first_positions", "slots", "path", "ranks", "row", "rows", "counts", "committed", "ids",
    "children", "law_row", "chosen", "num_accepted", "num_refused", "removed", "lanes", "where",
)  # fmt: skip
OF_DTYPE = ("qkv", "kv", "q_norm", "k_norm", "logits", "target", "draft", "scores")
FLOATS = ("inverse", "eps")


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel as it is launched. constants: its constexpr arguments, None of those left out; out: the type of its `out`."""

    name: str
    kernel: str
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 1
    out: str = ""
    max_registers: int | None = None


def variants() -> tuple[Variant, ...]:
    """What a round launches."""
    row: dict[str, Any] = {"V": VOCABULARY, **row_tiles.stats_tile(VOCABULARY)}
    row_warps = row.pop("num_warps")
    join = {"ASKED": 1, "BLOCK_K": 1, **row, "BLOCKS": noise_tiles.power_of_two(-(-VOCABULARY // row["BLOCK"]))}
    noisy: dict[str, Any] = {"V": VOCABULARY, **noise_tiles.noisy_tile(VOCABULARY)}
    noisy_warps = noisy.pop("num_warps")
    seen = {name: noisy[name] for name in ("V", "BLOCK")}
    heads, block_d = compact_tiles.tile(KV_HEADS, DIM)
    rope = {
        "HEADS": HEADS, "KV_HEADS": KV_HEADS, "HALF": DIM // 2, "BLOCK_H": rope_tiles.HEADS_AT_ONCE, "BLOCK_D": DIM // 2
    }  # fmt: skip
    chain = {"N": 4, "K": 1, "BLOCK_N": 8, "BLOCK_K": 1}
    walk = {"DEPTH": 3, "K": 4, "BLOCK_A": 4, "BLOCK_K": 4}
    tree = accept.tree_tile(VOCABULARY)
    tree_warps, tree_registers = tree.pop("num_warps"), tree.pop("maxnreg")
    none, rope_warps = {"q_norm": None, "k_norm": None}, rope_tiles.num_warps(DIM)
    untested = dict.fromkeys(("target_logprob", "draft_logprob", "seed", "sequences", "first_positions"))
    return (
        Variant("rope_append", "rope_append:rope_kernel", {**rope, "NORMED": False, **none}, rope_warps, "bf16"),
        Variant("rope_append with norms", "rope_append:rope_kernel", {**rope, "NORMED": True}, rope_warps, "bf16"),
        Variant("kv_compact", "kv_compact:compact_kernel", {
            "HEADS": KV_HEADS, "DIM": DIM, "BLOCK_H": heads, "BLOCK_D": block_d, "LONGEST": 4}, compact_tiles.WARPS),
        Variant("row_lse", "row_lse:stats_kernel", row, row_warps),
        Variant("row_lse joined", "row_lse:join_kernel", join),
        Variant("accept_chain_equal", "accept:chain_kernel", {**chain, "EQUAL": True, "POINT": True, **untested}),
        Variant("accept_chain", "accept:chain_kernel", {**chain, "EQUAL": False, "POINT": False, "chosen": None}),
        Variant("accept_tree_equal", "accept:tree_equal_kernel", {**walk, "ALL": True, "exists": None}),
        Variant("accept_tree", "accept:tree_kernel", {
            **walk, "NODES": 21, "LAWS": 13, "V": VOCABULARY, **tree}, tree_warps, max_registers=tree_registers),
        Variant("draw_gumbel", "sample_rows:gumbel_kernel", noisy, noisy_warps),
        *_draws(),
        Variant("ngram_match", "ngram:match_kernel", {
            "SIZES": ngram_tiles.bits_of((4, 3, 2)), "LONGEST": 4, "BLOCK": ngram_tiles.BLOCK, "BLOCK_D": 8}, 4,
            max_registers=ngram_tiles.MOST_REGISTERS),
        Variant("words", "noise:words_kernel", {"KIND": 0, "BLOCK": noise_tiles.WORDS_AT_ONCE}, 4, "i64"),
        Variant("gumbel", "noise:words_kernel", {"KIND": 1, "BLOCK": noise_tiles.WORDS_AT_ONCE}, 4, "fp64"),
        Variant("uniform", "noise:uniform_kernel", {"BLOCK": noise_tiles.WORDS_AT_ONCE}, 4, "fp64"),
        Variant("glance at logits", "noise:glance_kernel", {**seen, "IS_LAW": False}, noisy_warps),
        Variant("glance at a law", "noise:glance_kernel", {**seen, "IS_LAW": True}, noisy_warps),
        Variant("gumbel_argmax", "noise:argmax_kernel", noisy, noisy_warps),
    )  # fmt: skip


def _draws() -> tuple[Variant, ...]:
    """Draws by inverse distribution, each after the kernel that sums the blocks."""
    tile = sample_tiles.tile(VOCABULARY)
    launch: dict[str, Any] = {"num_warps": tile.pop("num_warps"), "max_registers": tile.pop("maxnreg")}
    blocks = {"BLOCKS": tile.pop("BLOCKS")}
    law: dict[str, Any] = {"V": VOCABULARY, **tile}
    residual = {"NODES": 5, "LAWS": 4, **law}
    chain = {**residual, "K": 1, "BLOCK_K": 1, "TABLED": False, "law_row": None}
    kinds: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("draw_inverse", "inverse", {**law, "K": 0, "removed": None}),
        ("draw_inverse of what 3 left", "inverse", {**law, "K": 3}),
        ("draw_residual of a chain", "residual", {**chain, "POINT": False}),
        ("draw_residual of a tree", "residual", {**residual, "K": 4, "BLOCK_K": 4, "TABLED": True, "POINT": False}),
        ("draw_residual of point masses", "residual", {**chain, "POINT": True, "draft": None, "draft_lse": None}),
    )
    sums = (Variant(f"sums of {name}", f"sample_rows:{kernel}_sums_kernel", known, **launch) for name, kernel, known in kinds)
    picks = (Variant(name, f"sample_rows:{kernel}_kernel", known | blocks, **launch) for name, kernel, known in kinds)
    return (*sums, *picks)


def shipped(
    sms: tuple[int, ...] = (80, 90, 100), dtypes: tuple[str, ...] = ("bf16", "fp32")
) -> Iterator[Callable[[], Compiled]]:
    """One function per kernel, GPU and dtype of the logits or the cache; calling it compiles."""
    for sm in sms:
        for dtype in dtypes:
            for variant in variants():
                yield partial(compile_variant, variant, sm, dtype)


def compile_variant(variant: Variant, sm: int, dtype: str) -> Compiled:
    """What a launch would compile."""
    from importlib import import_module

    folder, name = variant.kernel.split(":")
    kernel = getattr(import_module(f"{__package__}.{folder}.gpu_kernels"), name)
    fixed = POINTERS | dict.fromkeys(INT32, "*i32") | dict.fromkeys(OF_DTYPE, f"*{dtype}") | dict.fromkeys(FLOATS, "fp32")
    fixed["out"] = f"*{variant.out}"
    signature = {arg: fixed.get(arg, "i32") for arg in kernel.arg_names if arg not in variant.constants}
    unaligned = {kernel.arg_names[i] for i in range(len(kernel.arg_names)) if kernel.params[i].do_not_specialize}
    return compile_kernel(
        kernel, signature, variant.constants, sm, num_warps=variant.num_warps, max_registers=variant.max_registers,
        unaligned=unaligned, name=f"{variant.name} {dtype}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(report(shipped()))
