"""What is measured at which size: on a GPU, and in a rehearsal on a CPU.

Bars are shares of calibrated ceilings, so they hold on any GPU. They are predictions: nothing here was measured.

Not known here: how anything is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...costs import SHAPES, ModelShape
from ...records import Cell, KvView, SpecConfig
from ..kernel_shapes import KernelShape
from .round_calls import RoundSize

WINDOW = KvView.window(4, 512)


@dataclass(frozen=True, slots=True)
class KernelCell:
    """One attention call of one layer, and what is expected of it.

    queries     tokens per sequence, root counted; a chain, or a tree whose nodes have two children each
    view        what a draft reads; None: verification, which reads everything
    pass_share  of the read ceiling that must be reached, and aim_share what a good kernel reaches
    pass_flops  where computing is the limit instead
    pass_s      where only the time counts, as for a single small read
    """

    shape: KernelShape
    queries: int
    is_tree: bool = False
    view: KvView | None = None
    pass_share: float | None = None
    aim_share: float | None = None
    pass_flops: float | None = None
    pass_s: float | None = None

    def __str__(self) -> str:
        asks = f"tree of {self.queries}" if self.is_tree else f"T={self.queries}"
        return f"{self.shape} {asks}{f' window {self.view}' if self.view else ''}"


@dataclass(frozen=True, slots=True)
class ModelCells:
    """A model of random weights, what loads it, and the cells it is timed in."""

    name: str
    loads: str
    shape: ModelShape
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """All sizes of a run.

    repeats      of every timing, twice; most_layers take turns in it; most_cases of conformance per need
    energy_s   of each configuration's own stretch for joules per token; the counter needs a second
    laws, round_configs  how many of those that device rounds are checked with
    config     whose rounds are timed; its chain and window are those of the expectations
    etas       (cell, plain, verify): shares of the physical limit that the largest model is to reach; so are draft_eta, ideal
    headline   lengths x batches; alpha: acceptance per token, set
    layouts    cells in which the cache lies in both orders, in turns
    gate_cells of the shipped pair, where tokens of peers must be ours; peer_cells then give their times, at the shape of the
               first model; gpt_fast: a target and its draft, whose shapes it can have, and gpt_fast_cell where they are timed
    """

    dtype: str
    repeats: int
    most_layers: int
    most_cases: int
    laws: int
    round_configs: int
    kernels: tuple[KernelCell, ...]
    round_size: RoundSize
    models: tuple[ModelCells, ...]
    config: SpecConfig
    rounds: int  # timed, of each kind
    energy_s: float
    etas: tuple[tuple[Cell, float, float | None], ...]
    draft_eta: float
    ideal: float  # S / S_ideal where KV is most of plain decoding
    headline: tuple[int, ...]
    batches: tuple[int, ...]
    alpha: float
    exposed: tuple[KernelCell, ...]
    overhead_cell: Cell
    overhead_rounds: int
    overhead_blocks: int
    tune_batches: tuple[int, ...]
    tune_lengths: tuple[int, ...]
    tune_s: float
    trace_cell: Cell
    peer_cells: tuple[Cell, ...]
    peer_tokens: int
    gate_cells: tuple[Cell, ...]
    gpt_fast_cell: Cell
    gpt_fast: tuple[str, str]
    layouts: tuple[KernelCell, ...]
    far_offset_bytes: int  # beyond which 32-bit offsets of elements wrap; in a rehearsal nothing is that large


def _verify(text: str, queries: int, **expected: object) -> KernelCell:
    return KernelCell(KernelShape.parse(text), queries, **expected)  # type: ignore[arg-type]


# Shares: predictions for the H200 at 4.3 TB/s and 788 TFLOP/s, to be met or missed.
VERIFY = (
    _verify("32x32k/8x128g4", 5, pass_share=0.87, aim_share=0.94),
    _verify("8x32k/8x128g4", 5, pass_share=0.85),
    _verify("1x128k/8x128g4", 5, pass_share=0.82),
    _verify("1x32k/8x128g4", 5, pass_share=0.70),
    _verify("8x4k/8x128g4", 5, pass_share=0.70),
    _verify("7x32k/32x128", 5, pass_share=0.88),
    _verify("1x32k/8x128g4", 64, is_tree=True, pass_flops=400e12),
)
DRAFT = (
    _verify("32x4k/8x128g4", 1, view=WINDOW, pass_share=0.60),
    _verify("128x2k/8x128g4", 1, view=WINDOW, pass_share=0.79),
    _verify("1x4k/8x128g4", 1, view=WINDOW, pass_s=9e-6),
)
LARGE, SMALL = SHAPES["Llama-3.1-8B"], SHAPES["1.7B"]
CELLS = (Cell(1, 4096), Cell(8, 32768), Cell(32, 16384))

FULL = Sizes(
    dtype="bfloat16", repeats=50, most_layers=64, most_cases=10_000, laws=3, round_configs=7, kernels=(*VERIFY, *DRAFT),
    round_size=RoundSize(32, 4, 1024, LARGE),
    models=(
        ModelCells("1.7B", "random:qwen3-1.7b", SMALL, CELLS),
        ModelCells("Llama-3.1-8B", "random:llama-3.1-8b", LARGE, CELLS),
    ),
    config=SpecConfig.parse("self:4+512/chain4"), rounds=48, energy_s=1.2,
    etas=((Cell(1, 4096), 0.75, None), (Cell(8, 32768), 0.82, None), (Cell(32, 16384), 0.85, 0.80)),
    draft_eta=0.72, ideal=0.88, headline=(4096, 16384, 32768), batches=(1, 4, 16, 32), alpha=0.8,
    exposed=(_verify("8x32k/8x128g4", 5), _verify("32x16k/8x128g4", 5)),
    overhead_cell=Cell(8, 4096), overhead_rounds=200, overhead_blocks=2, tune_batches=(1, 8), tune_lengths=(1024, 4096),
    tune_s=30.0, trace_cell=Cell(4, 2048), peer_cells=(Cell(1, 4096), Cell(8, 4096)), peer_tokens=64,
    gate_cells=(Cell(1, 512), Cell(4, 128)), gpt_fast_cell=Cell(1, 4096), gpt_fast=("random:llama-3.1-8b", "random:draft-1b"),
    layouts=VERIFY[:4], far_offset_bytes=5 << 30,
)

_TINY_SHAPE = ModelShape(2, 64, 16, 8, 16, 192, 512)  # of random:tiny
TINY = Sizes(
    dtype="float32", repeats=3, most_layers=3, most_cases=6, laws=1, round_configs=2,
    kernels=(
        _verify("2x70/2x16g2", 3, pass_share=0.87, aim_share=0.94),
        _verify("1x40/2x16g2", 7, is_tree=True, pass_flops=400e12),
        _verify("2x70/2x16g2", 1, view=KvView.window(2, 9), pass_share=0.60),
        _verify("1x70/2x16g2", 1, view=KvView.window(2, 9), pass_s=9e-6),
    ),
    round_size=RoundSize(2, 3, 40, _TINY_SHAPE),
    models=(ModelCells("tiny", "random:tiny", _TINY_SHAPE, (Cell(1, 24), Cell(2, 40))),),
    config=SpecConfig.parse("self:2+14/chain3"), rounds=4, energy_s=0.0,
    etas=((Cell(1, 24), 0.75, None), (Cell(2, 40), 0.85, 0.80)),
    draft_eta=0.72, ideal=0.88, headline=(24, 40), batches=(1, 2), alpha=0.8, exposed=(_verify("2x70/2x16g2", 3),),
    overhead_cell=Cell(2, 24), overhead_rounds=4, overhead_blocks=2, tune_batches=(1,), tune_lengths=(64,), tune_s=2.0,
    trace_cell=Cell(2, 24), peer_cells=(Cell(1, 24),), peer_tokens=6,
    gate_cells=(Cell(1, 32), Cell(2, 20)), gpt_fast_cell=Cell(1, 24), gpt_fast=("random:tiny-square", "random:tiny-square"),
    layouts=(_verify("2x70/2x16g2", 3),), far_offset_bytes=0,
)
