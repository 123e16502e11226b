"""Compile cpu.c, which includes every operation's, on first use into a cache keyed by source, compiler and processor.

Two processes may compile at once: each writes a file of its own name and renames it. A cached file that does not load is
compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.c")
PARTS = tuple(sorted(SOURCE.parent.glob("*/*.c")))
# -O2: -O3 rearranges the score loop, and four queries then cost 1.2 to 1.4 times one instead of 1.1
# never -ffast-math: linking with it turns on flush-to-zero for the whole process, and voids the -inf and NaN guards
FLAGS = ("-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
TARGETS = {"native": "-march=native", "avx2": "-march=x86-64-v3"}


class CannotBuild(RuntimeError):
    """The kernel could not be compiled or loaded here; the message is one sentence that says why."""


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "specdec_lab"


def find_compiler() -> str:
    """The C compiler: $CC, else cc, gcc or clang; CannotBuild if there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise CannotBuild("there is no C compiler (looked for $CC, cc, gcc, clang); install gcc to use the compiled kernels")


def _processor() -> str:
    """What decides which instructions `native` means."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise CannotBuild(f"{command[0]} cannot compile the CPU kernels: {first}")
    return done.stdout


def library_path(target: str, folder: Path | None = None) -> Path:
    """The cached library for this source, compiler, flags and processor, whether it exists or not."""
    compiler = find_compiler()
    version = _run([compiler, "--version"]).splitlines()[0]
    sources = (part.read_text() for part in (SOURCE, *PARTS))
    key = "\n".join((*sources, compiler, version, *FLAGS, TARGETS[target], _processor()))
    return (folder or cache_folder()) / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def compile_library(path: Path, target: str) -> None:
    """Compile into `path`, atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise CannotBuild(f"the kernel cache {path.parent} cannot be written ({error.strerror}); set XDG_CACHE_HOME") from None
    try:
        _run([find_compiler(), *FLAGS, TARGETS[target], "-o", name, str(SOURCE), "-lm"])
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@lru_cache(maxsize=4)
def load_library(target: str = "native", folder: Path | None = None) -> ctypes.CDLL:
    """The loaded kernels for `target` ("native" or "avx2"); compiles it when it is not cached. CannotBuild says why not."""
    path = library_path(target, folder)
    if not path.exists():
        compile_library(path, target)
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # cut short or damaged: build it anew, once
        path.unlink(missing_ok=True)
        compile_library(path, target)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise CannotBuild(f"the compiled kernels do not load: {error}") from None
    for name in ("tree_attention_workspace", "decoder_scratch", "decoder_packed"):
        getattr(library, name).restype = ctypes.c_int64
    return library
