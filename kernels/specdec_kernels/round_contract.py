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
    **dict.fromkeys(("seed", "refused", "best", "tokens", "texts", "lengths", "work", "num_tokens"), "*i64"),
    **dict.fromkeys(("offered_mass", "rest_mass"), "*fp64"),
    **dict.fromkeys(("cos", "sin", "lse", "best_value", "logprob", "target_logprob", "draft_logprob"), "*fp32"),
    **dict.fromkeys(("target_lse", "draft_lse", "law"), "*fp32"), "exists": "*i1",
}  # fmt: skip
INT32 = (
    "sequences", "positions", "first_positions", "slots", "path", "ranks", "row", "rows", "counts", "committed", "ids",
    "children", "law_row", "chosen", "num_accepted", "num_refused", "removed", "lanes",
)  # fmt: skip
OF_DTYPE = ("qkv", "kv", "q_norm", "k_norm", "logits", "target", "draft")
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
    row_block = row_tiles.block_of(VOCABULARY)
    noisy = {"V": VOCABULARY, "BLOCK": noise_tiles.noisy_block(VOCABULARY)}
    noisy_warps = noise_tiles.noisy_warps(VOCABULARY)
    entries, heads = compact_tiles.tile(4)
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
            "HEADS": KV_HEADS, "DIM": DIM, "BLOCK_A": entries, "BLOCK_H": heads, "BLOCK_D": DIM, "LONGEST": 4}, 4),
        Variant("row_lse", "row_lse:stats_kernel", {
            "ASKED": 1, "BLOCK_K": 1, "V": VOCABULARY, "BLOCK": row_block}, row_tiles.warps_of(row_block)),
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
        Variant("gumbel_argmax", "noise:argmax_kernel", noisy, noisy_warps),
    )  # fmt: skip


def _draws() -> tuple[Variant, ...]:
    """Draws by inverse distribution."""
    tile = sample_tiles.tile(VOCABULARY)
    launch: dict[str, Any] = {"num_warps": tile.pop("num_warps"), "max_registers": tile.pop("maxnreg")}
    inverse: dict[str, Any] = {"V": VOCABULARY, **tile}
    residual = {"NODES": 5, "LAWS": 4, **inverse}
    chain = {**residual, "K": 1, "BLOCK_K": 1, "TABLED": False, "law_row": None}
    tree = {**residual, "K": 4, "BLOCK_K": 4, "TABLED": True, "POINT": False}
    points = {**chain, "POINT": True, "draft": None, "draft_lse": None}
    kernel = "sample_rows:residual_kernel"
    return (
        Variant("draw_inverse", "sample_rows:inverse_kernel", {**inverse, "K": 0, "removed": None}, **launch),
        Variant("draw_inverse of what 3 left", "sample_rows:inverse_kernel", {**inverse, "K": 3}, **launch),
        Variant("draw_residual of a chain", kernel, {**chain, "POINT": False}, **launch),
        Variant("draw_residual of a tree", kernel, tree, **launch),
        Variant("draw_residual of point masses", kernel, points, **launch),
    )


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
