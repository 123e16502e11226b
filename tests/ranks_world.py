"""Two real processes that meet over gloo, each with its output apart; what torchrun does, without torchrun's own words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def run_ranks(*words: object, ranks: int = 2, cwd: object = None, limit_s: float = 150.0) -> tuple[list[Ended], float]:
    """`python *words` as ranks of one group: how each ended, and seconds until the last one had."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    environments = [{**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    running = [
        subprocess.Popen([sys.executable, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, cwd=cwd)
        for environment in environments
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=limit_s) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(p.returncode, *words) for p, words in zip(running, said, strict=True)], time.monotonic() - started
