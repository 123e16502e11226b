"""Whether this machine can do a GPU run, and what it will have to leave out; in plain words.

What is asked of the machine is injected in tests. Not known here: the stages.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from ...sensors import Absent, Sensors

OLDEST = (8, 0)
REHEARSE = "specdec-lab gpu --rehearse walks through every stage with tiny shapes on the CPU and measures nothing"
OPTIONAL = {
    "triton": "our GPU kernels cannot run: attention is torch's SDPA, and every kernel row says so",
    "pynvml": "no power, clocks or energy (package nvidia-ml-py)",
    "optuna": "the stage tune is skipped",
    "plotly": "figures are drawn as SVG only",
    "flash_attn": "no comparison with flash-attn",
    "flashinfer": "no comparison with FlashInfer (package flashinfer-python, which compiles with nvcc and ninja)",
}
TOOLS = {"compute-sanitizer": "memory and races are not checked", "ncu": "counted bytes are not compared with the hardware's"}


@dataclass(frozen=True, slots=True)
class Machine:
    """What torch says of its GPU; None where there is none."""

    torch: str
    cuda: str | None  # that torch was built with
    name: str | None = None
    capability: tuple[int, int] | None = None
    memory_bytes: int = 0


def look() -> Machine:
    """This machine, as torch sees it."""
    import torch

    built = torch.version.cuda
    if built is None or not torch.cuda.is_available():
        return Machine(torch.__version__, built)
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        torch.__version__, built, torch.cuda.get_device_name(0), (properties.major, properties.minor),
        int(properties.total_memory),
    )  # fmt: skip


def why_not(found: Machine) -> str | None:
    """None if a GPU run can begin, else what is wrong and what can be done instead."""
    if found.cuda is None:
        return (
            f"a GPU run needs a CUDA build of torch; this Python has torch {found.torch}, which runs on the CPU. Install one "
            f"on a machine with an NVIDIA GPU (make gpu PYTHON=... takes another Python). {REHEARSE}"
        )
    if found.capability is None:
        return (
            f"torch {found.torch} is built for CUDA {found.cuda} but sees no GPU: none is there, its driver is missing or too "
            f"old for CUDA {found.cuda}, or CUDA_VISIBLE_DEVICES hides it (nvidia-smi tells). {REHEARSE}"
        )
    if found.capability < OLDEST:
        major, minor = found.capability
        return (
            f"{found.name} is sm_{major}{minor}; the kernels need sm_{OLDEST[0]}{OLDEST[1]} or later (bfloat16 tensor cores "
            f"and asynchronous copies: A100, RTX 30 and newer). {REHEARSE}"
        )
    return None


def notes(
    has_module: Callable[[str], bool] = lambda name: find_spec(name) is not None,
    has_tool: Callable[[str], bool] = lambda name: shutil.which(name) is not None,
    nvml: Callable[[], Absent | None] | None = None,
) -> Iterable[str]:
    """What will be left out, and what for."""
    for name, loss in OPTIONAL.items():
        if not has_module(name):
            yield f"{name} is not installed: {loss}"
    for name, loss in TOOLS.items():
        if not has_tool(name):
            yield f"{name} is not on PATH: {loss}"
    absent = (nvml or _nvml)() if has_module("pynvml") else None
    if absent is not None:
        yield f"NVML says nothing ({absent.reason}): no power, clocks or energy, so throttling cannot be seen"


def _nvml() -> Absent | None:
    watch = Sensors()
    try:
        return watch.gpu_absent
    finally:
        watch.close()


def driver() -> str | None:
    """The driver's version, if NVML tells it."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
