"""What a Triton kernel compiles to for GPUs that are not here: registers, spills, shared memory and machine code.

Triton compiles ahead of time without a GPU, and its wheel brings `cuobjdump` and `nvdisasm`. So a test can hold a kernel to
this on any machine: no spills, shared memory within the limit, 16-byte loads, tensor-core instructions. Speed is not among it.
`python -m specdec_kernels.contract` prints one line per tile that we ship. Not known here: what a kernel computes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of one block, by compute capability
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
WIDE_LOAD = re.compile(r"\b(LDG|LDGSTS)\.[A-Z0-9.]*128\b")
SPILL = re.compile(r"\b(STL|LDL)\b")  # stores to and loads from local memory


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one GPU.

    registers     per thread
    shared_bytes  per block, static and dynamic
    stack_bytes   local memory per thread; anything above 0 is a spill or an array that is not in registers
    spills        instructions that touch local memory
    wide_loads    global loads of 16 bytes per thread
    tensor_cores  the kinds of tensor-core instruction in it: HMMA, HGMMA (Hopper's warpgroups), UTCHMMA (Blackwell's)
    """

    name: str
    sm: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    wide_loads: int
    tensor_cores: tuple[str, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """Why nobody should ship it, in words."""
        found = []
        if self.spills or self.stack_bytes:
            found.append(f"{self.spills} instructions spill, {self.stack_bytes} bytes of stack")
        if self.shared_bytes > SHARED_LIMIT[self.sm]:
            found.append(f"{self.shared_bytes:,} bytes of shared memory, sm_{self.sm} has {SHARED_LIMIT[self.sm]:,}")
        return tuple(found)

    def __str__(self) -> str:
        cores = "+".join(self.tensor_cores) or "no tensor cores"
        return (
            f"{self.name:44} sm_{self.sm:<4} {self.registers:4} registers {self.shared_bytes / 1024:6.1f} KiB shared "
            f"{self.wide_loads:3} 16-byte loads  {cores:11} {'; '.join(self.faults) or 'good'}"
        )


def compile_kernel(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], sm: int, *, num_warps: int = 4,
    num_stages: int = 3, max_registers: int | None = None, unaligned: Iterable[str] = (), name: str = "",
) -> Compiled:
    """Compile a `@triton.jit` function for sm_80, 90 or 100 and read what came out. Takes 2 to 12 seconds.

    signature  type of every argument that is no constant: "*bf16", "*i32", "i32", "fp32", ...
    constants  value of every constexpr argument, None of an optional one too; both as a launch would have them
    unaligned  arguments that are not a multiple of 16; pointers and integers are taken to be, as Triton specialises launches
    raises     RuntimeError where Triton interprets instead of compiling
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set, so Triton compiles nothing: unset it to check what kernels compile to")
    types = {arg: signature.get(arg, "constexpr") for arg in kernel.arg_names}
    places = {arg: i for i, arg in enumerate(kernel.arg_names)}
    aligned = [a for a, t in types.items() if (t[0] == "*" or t in ("i32", "i64")) and a not in set(unaligned)]
    attributes = {(places[a],): [["tt.divisibility", 16]] for a in aligned}
    source = ASTSource(kernel, types, {(places[a],): value for a, value in constants.items()}, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return _read(name or kernel.__name__, sm, compiled.asm["cubin"], compiled.metadata.shared)


def _read(name: str, sm: int, cubin: bytes, shared_bytes: int) -> Compiled:
    """Ask the wheel's own tools about machine code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = _tool("cuobjdump", "--dump-resource-usage", str(file)), _tool("nvdisasm", "-c", str(file))
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Compiled(
        name, sm, used["REG"], shared_bytes + used.get("SHARED", 0), used["STACK"] + used["LOCAL"], len(SPILL.findall(code)),
        len(WIDE_LOAD.findall(code)), tuple(sorted(set(TENSOR_CORE.findall(code)))),
    )  # fmt: skip


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Every tile of the attention kernels that we ship; 1 if one has a fault. Those of a round: round_contract.py."""
    from .tree_attention.gpu_contract import shipped

    return report(shipped())


def report(variants: Iterable[Callable[[], Compiled]]) -> int:
    """Compile each and print what came out; 1 if one has a fault."""
    import triton

    print(f"Triton {triton.__version__}")
    faulty = 0
    for compile_one in variants:
        compiled = compile_one()
        faulty += bool(compiled.faults)
        print(compiled, flush=True)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
