"""tree_attention on GPUs through Triton; meaning and arguments as in reference.py.

Not known here: how the kernels work (gpu_kernels.py) and with which tiles (gpu_tiles.py).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .gpu_tiles import CHUNK, WINDOW_CHUNK, Tile, tile

MAX_QUERIES = 64
MAX_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PARTS_AT_ONCE = 8  # that the combine kernel reads at once
NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class WorkList:
    """What `specdec_kernels.work_list` made on the device: items int32 [N, 5], count int32 [1]; programs: of the grid."""

    items: Tensor
    count: Tensor
    programs: int


def is_interpreted() -> bool:
    """Whether Triton interprets instead of compiling, which it decides when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: str, dim: int, dtype: torch.dtype) -> str | None:
    """None if the kernels run here for this head size and KV dtype, else the reason in one sentence."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'specdec_lab[gpu]'"
    if device == "cpu" and not is_interpreted():
        return "the Triton kernels need a CUDA device (on the CPU only Triton's interpreter runs them: TRITON_INTERPRET=1)"
    if device == "cuda" and is_interpreted():
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter is for tensors on the CPU"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels do not run on {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        major, minor = torch.cuda.get_device_capability()
        return f"the Triton kernels need compute capability 8.0 (Ampere) or newer, this GPU has {major}.{minor}"
    if is_interpreted() and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly; float32 and float16 are right there"
    if dtype not in DTYPES:
        return f"the Triton kernels read float16, bfloat16 or float32 KV, not {str(dtype).removeprefix('torch.')}"
    if dim % 8 or dim > MAX_DIM:
        return f"the Triton kernels take head sizes that are multiples of 8 up to {MAX_DIM}, not {dim}"
    return None


def pack_corner(corner: Tensor) -> Tensor:
    """bool [T, C] -> int32 [T, ceil(C/32)], bit c % 32 of word c // 32 set where the query sees node c. No host sync."""
    queries, nodes = corner.shape
    words = -(-nodes // 32)
    bits = torch.nn.functional.pad(corner.to(torch.int64), (0, words * 32 - nodes)).view(queries, words, 32)
    packed = (bits << torch.arange(32, device=corner.device)).sum(-1)  # 0 .. 2^32 - 1
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def window_scalars(sink: int, recent: int, device: torch.device, sliding: int | None = None) -> Tensor:
    """What `window` takes: int32 [3], sinks, window, and how far back sinks are seen. Read on the device at every launch.

    sliding  window of a model's own sliding-window layers, in tokens, which hides sinks too
    """
    reach = NO_LIMIT
    if sliding is not None and (recent == 0 or sliding <= recent):
        sink, recent = 0, sliding
    elif sliding is not None:
        reach = sliding
    return torch.tensor([sink, recent, reach], dtype=torch.int32, device=device)


def default_chunk(windowed: bool) -> int:
    """Keys of one part. A constant: a sequence's bits do not depend on its batch."""
    return WINDOW_CHUNK if windowed else CHUNK


def block_d(dim: int) -> int:
    """The power of two that holds a head."""
    return max(16, 1 << (dim - 1).bit_length())


def num_parts(slots: int, chunk: int) -> int:
    """Parts that sequences of up to `slots` keys are split into."""
    return -(-slots // chunk)


def workspace_floats(batch: int, heads: int, queries: int, dim: int, slots: int, chunk: int) -> int:
    """float32 elements that `workspace` must have: every part's values and log-sum-exp; 0 where one part holds all."""
    parts = num_parts(slots, chunk)
    return batch * heads * queries * parts * (dim + 1) if parts > 1 else 0


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, committed: Tensor, corner: Tensor, node_depth: Tensor, query_node: Tensor, *,
    scale: float, sink: int = 0, recent: int = 0, index: Tensor | None = None, window: Tensor | None = None,
    alias_mask: int | None = None, stamps: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None,
    workspace: Tensor | None = None, longest: int | None = None, chunk: int | None = None, work: WorkList | None = None,
    tiles: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See reference.tree_attention; k and v of one dtype and strides. Two launches (one if one part holds all keys), no sync.

    committed, node_depth, query_node  int32 or int64, on the device; their values are read there, at every launch
    corner      bool [T, C], or what pack_corner made of it (int32), which spares packing it here
    sink, recent  as in the reference. In a CUDA graph give `window` instead: on the device, so that a replay reads new values
    window      int32 [3] from window_scalars. recent = 0 in it means everything, as in the reference. Overrides sink and recent
    index       int32 [B, Hkv, N], contiguous. Entries that count must lie before the window, ascending; that is not checked
    alias_mask  a small power of two minus one: KV is read from slot & alias_mask, so all of it comes from L2. A measurement:
                what comes out is attention over those aliased keys
    stamps      int64 [2]: the earliest start and the latest end of any program by the GPU's global timer, in ns, joined to what
                it holds by min and max; start it with (2**63 - 1, 0). Not in the interpreter, which has no timer
    out, lse    written and returned where given: [B, T, Hq, D], last dimension contiguous; float32 [B, T, Hq], contiguous
    workspace   float32, at least workspace_floats(B, Hq, T, D, longest, chunk) elements; its contents do not matter
    longest     no row has more keys than this (committed and corner); default: S. It sizes the grid, and is a host integer
    chunk       keys of one part, a multiple of 64. Bits depend on it. Default CHUNK, with a window WINDOW_CHUNK
    work        a work list for the same committed lengths, chunk, corner and window: `longest` then sizes only the workspace
    returns     out in q's dtype and the natural log-sum-exp in float32; a query that sees nothing: 0 and -inf

    With out, lse and workspace, window (or no window), packed corner and int32 inputs given nothing is allocated.
    """
    if window is None and recent > 0:
        window = window_scalars(sink, recent, q.device)
        most = (index.shape[2] if index is not None else sink) + recent + node_depth.shape[0]
        longest = min(most, longest or k.shape[2])
    index = index if window is not None else None
    shape = _Shape.of(q, k, node_depth, index, window is not None, longest, chunk, tiles, work is not None)
    _check(q, k, v, corner, query_node, scale, index, window, shape)
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if lse is None else lse
    if workspace is None and shape.parts > 1:
        workspace = torch.empty(shape.floats, dtype=torch.float32, device=q.device)
    _check_outputs(q, out, lse, workspace, shape)
    words = corner if corner.dtype == torch.int32 else pack_corner(corner)
    tensors = (q, k, v, committed, words, node_depth, query_node, window, index, out, lse)
    _split(tensors, shape, scale, alias_mask, stamps, workspace, work)
    if shape.parts > 1:
        _combine(tensors, shape, stamps, workspace)
    return out, lse


@dataclass(frozen=True, slots=True)
class _Shape:
    """The sizes of one call, and the tile that suits them."""

    batch: int
    queries: int
    kv_heads: int
    group: int
    dim: int
    nodes: int
    list_len: int
    windowed: bool
    chunk: int
    parts: int
    tile: Tile

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, node_depth: Tensor, index: Tensor | None, windowed: bool, longest: int | None,
        chunk: int | None, tiles: Tile | None, work_list: bool,
    ) -> _Shape:  # fmt: skip
        batch, queries, heads, dim = q.shape
        group, chunk = heads // k.shape[1], chunk or default_chunk(windowed)
        return cls(
            batch, queries, k.shape[1], group, dim, node_depth.shape[0], 0 if index is None else index.shape[2], windowed,
            chunk, num_parts(longest or k.shape[2], chunk),
            tiles or tile(
                queries * group, dim, k.element_size(), *_versions(q.device), windowed=windowed, work_list=work_list
            ),
        )  # fmt: skip

    @property
    def listed(self) -> bool:
        return self.list_len > 0

    @property
    def rows(self) -> int:
        """Packed query rows of one KV head."""
        return self.queries * self.group

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.tile.block_m)

    @property
    def part_values(self) -> int:
        """Elements of all parts' values; their log-sum-exps follow."""
        return self.batch * self.kv_heads * self.parts * self.rows * self.dim

    @property
    def floats(self) -> int:
        return self.part_values // self.dim * (self.dim + 1) if self.parts > 1 else 0


@lru_cache(maxsize=16)
def _versions(device: torch.device) -> tuple[int, int]:
    """Compute capability as in sm_90 (0: interpreted) and the minor version of Triton 3."""
    import triton

    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return major * 10 + minor, int(triton.__version__.split(".")[1])


def _parts(workspace: Tensor | None, shape: _Shape) -> tuple[Tensor | None, Tensor | None]:
    if workspace is None or shape.parts == 1:
        return None, None
    return workspace, workspace[shape.part_values :]


def _split(
    tensors: tuple[Tensor | None, ...], shape: _Shape, scale: float, alias_mask: int | None, stamps: Tensor | None,
    workspace: Tensor | None, work: WorkList | None,
) -> None:  # fmt: skip
    """Launch the main kernel, over a grid of all possible parts or over a work list."""
    from .gpu_kernels import LOG2_E, list_kernel, split_kernel

    q, k, out = tensors[0], tensors[1], tensors[9]
    assert q is not None
    assert k is not None
    assert out is not None
    words = tensors[4]
    assert words is not None
    scalars = (
        scale * LOG2_E.value, alias_mask or 0, shape.queries, shape.nodes, shape.list_len, words.shape[1], shape.kv_heads,
        shape.parts, shape.chunk, shape.row_blocks, *q.stride()[:3], *k.stride()[:3], *out.stride()[:3],
    )  # fmt: skip
    chosen = shape.tile
    constants = {
        "GROUP": shape.group, "DIM": shape.dim, "BLOCK_D": block_d(shape.dim),
        "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n,
        "WINDOWED": shape.windowed, "LISTED": shape.listed, "FINAL": shape.parts == 1, "ALIASED": alias_mask is not None,
        "STAMPED": stamps is not None, "MOST": MAX_QUERIES,
    }  # fmt: skip
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "maxnreg": chosen.max_registers}
    memory = (*tensors, *_parts(workspace, shape), stamps)
    if work is None:
        grid = (shape.row_blocks * shape.parts, shape.batch * shape.kv_heads)
        split_kernel[grid](*memory, *scalars, **constants, **options)
    else:
        list_kernel[(work.programs,)](*memory, work.items, work.count, *scalars, **constants, **options)


def _combine(tensors: tuple[Tensor | None, ...], shape: _Shape, stamps: Tensor | None, workspace: Tensor | None) -> None:
    """Launch the kernel that joins the parts of every row."""
    from .gpu_kernels import combine_kernel

    committed, (node_depth, query_node, window), (out, lse) = tensors[3], tensors[5:8], tensors[9:11]
    assert out is not None
    combine_kernel[(shape.batch * shape.rows, shape.kv_heads)](
        *_parts(workspace, shape), committed, node_depth, query_node, window, out, lse, stamps,
        shape.queries, shape.nodes, shape.list_len, shape.kv_heads, shape.parts, shape.chunk, *out.stride()[:3],
        GROUP=shape.group, DIM=shape.dim, BLOCK_D=block_d(shape.dim), BLOCK_S=PARTS_AT_ONCE, WINDOWED=shape.windowed,
        LISTED=shape.listed, STAMPED=stamps is not None, MOST=MAX_QUERIES, num_warps=1,
    )  # fmt: skip


def _check(
    q: Tensor, k: Tensor, v: Tensor, corner: Tensor, query_node: Tensor, scale: float, index: Tensor | None,
    window: Tensor | None, shape: _Shape,
) -> None:  # fmt: skip
    """ValueError for what would read the wrong memory; values on the device are not looked at."""
    if not 1 <= shape.queries <= MAX_QUERIES:
        raise ValueError(f"tree_attention takes 1 to {MAX_QUERIES} queries per sequence, not {shape.queries}")
    if k.dtype != v.dtype or k.stride() != v.stride() or k.shape != v.shape or k.stride(3) != 1 or q.stride(3) != 1:
        raise ValueError("tree_attention takes keys and values of one dtype and layout, and the last dimension contiguous")
    if k.dtype not in DTYPES or shape.dim % 8 or shape.dim > MAX_DIM or k.shape[3] != shape.dim:
        raise ValueError(
            f"tree_attention takes head sizes that are multiples of 8 up to {MAX_DIM} and 16- or 32-bit floats, not queries of "
            f"{shape.dim} and keys of {k.shape[3]} {k.dtype}"
        )
    if q.shape[2] != shape.group * shape.kv_heads or k.shape[0] != shape.batch:
        raise ValueError(f"queries {list(q.shape)} do not fit keys {list(k.shape)}: batch, or heads no multiple of KV heads")
    wide = shape.nodes if corner.dtype == torch.bool else -(-shape.nodes // 32)
    if corner.dtype not in (torch.bool, torch.int32) or tuple(corner.shape) != (shape.queries, wide):
        raise ValueError(
            f"the corner of {shape.queries} queries and {shape.nodes} nodes is bool [{shape.queries}, {shape.nodes}] or what "
            f"pack_corner makes of that, got {corner.dtype} {list(corner.shape)}"
        )
    if query_node.shape[0] != shape.queries or not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"query_node names {query_node.shape[0]} of {shape.queries} queries; scale {scale} must be above 0")
    if shape.chunk % shape.tile.block_n:
        raise ValueError(f"chunk must be a multiple of {shape.tile.block_n} keys, got {shape.chunk}")
    if window is not None and (window.dtype != torch.int32 or window.numel() != 3):
        raise ValueError(f"window is int32 [3] from window_scalars, got {window.dtype} {list(window.shape)}")
    if shape.listed and index is not None and (index.dtype != torch.int32 or not index.is_contiguous()):
        raise ValueError(f"index lists are contiguous int32 [batch, KV heads, N], got {index.dtype} {list(index.shape)}")


def _check_outputs(q: Tensor, out: Tensor, lse: Tensor, workspace: Tensor | None, shape: _Shape) -> None:
    if out.shape != q.shape or out.stride(3) != 1:
        raise ValueError(f"out must be {list(q.shape)} with the last dimension contiguous, got {list(out.shape)}")
    if lse.dtype != torch.float32 or lse.shape != q.shape[:3] or not lse.is_contiguous():
        raise ValueError(f"lse must be contiguous float32 {list(q.shape[:3])}, got {lse.dtype} {list(lse.shape)}")
    if shape.parts > 1 and (workspace is None or workspace.dtype != torch.float32 or workspace.numel() < shape.floats):
        got = "none" if workspace is None else f"{workspace.dtype} of {workspace.numel():,}"
        raise ValueError(f"workspace must hold {shape.floats:,} float32 elements (workspace_floats), got {got}")
