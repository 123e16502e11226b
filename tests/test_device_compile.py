"""Every kernel that a round launches compiles for a GPU that is not here, with the arguments that the round gives it."""

from __future__ import annotations

import pytest
import torch

import specdec_lab as sd
import tiny
from specdec_lab.engine import attention, tree_layout
from specdec_lab.engine.device.forward import Net
from specdec_lab.engine.device.kernel_deciding import KernelDeciding, RoundKernels
from specdec_lab.engine.device.ops import TritonOps
from specdec_lab.engine.device.program import Program
from specdec_lab.engine.device.round import Stage, play
from specdec_lab.engine.device.state import DeviceState
from specdec_lab.engine.sampling import Noise, Processor
from specdec_lab.records import SpecConfig
from test_device import to_meta

triton = pytest.importorskip("triton")
TYPES = {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1", torch.float32: "fp32", torch.float64: "fp64",
         torch.bfloat16: "bf16"}  # fmt: skip
SM = 90


class TimedOps(TritonOps):
    @staticmethod
    def has_timer(tensor):
        return True


def _is_one(value):
    """Whether Triton makes a constant of an argument that is not told to stay one."""
    return isinstance(value, int) and value == 1


def launches(config, law, monkeypatch):
    """What a round of a bfloat16 model launches: kernel, signature, constants, options; each once. Nothing runs."""
    from specdec_kernels.tree_attention import gpu as attention_gpu

    found = {}

    def noted(kernel, *args, grid, warmup, **more):
        del grid, warmup
        given = dict(zip(kernel.arg_names, args, strict=False)) | {n: more[n] for n in more if n in kernel.arg_names}
        options = {n: more[n] for n in ("num_warps", "num_stages") if n in more}
        constants, signature, unaligned = {}, {}, []
        for param in kernel.params:
            value = given[param.name]
            if param.is_constexpr or value is None or (_is_one(value) and not param.do_not_specialize):
                constants[param.name] = value
            elif isinstance(value, torch.Tensor):
                signature[param.name] = "*" + TYPES[value.dtype]
            else:
                signature[param.name] = "fp32" if isinstance(value, float) else "i64" if abs(value) >= 1 << 31 else "i32"
                if isinstance(value, int) and (value % 16 or param.do_not_specialize):
                    unaligned.append(param.name)
        found[repr((kernel.__name__, signature, constants, options))] = kernel, signature, constants, unaligned, options

    monkeypatch.setattr(triton.runtime.JITFunction, "run", noted)
    monkeypatch.setattr(attention_gpu, "_versions", lambda device: (SM, int(triton.__version__.split(".")[1])))
    attention._chain.cache_clear()
    tree_layout.layout_of.cache_clear()
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "head_dim": 64}
    pair = sd.load(tiny.model("qwen3", **sizes), tiny.model("llama", seed=1, **sizes), dtype="bfloat16")
    with torch.inference_mode():
        state = to_meta(DeviceState.of(torch.ones(3, 4096, dtype=torch.int64), [0, 5], 1000, 8, 1))
        nets = [Net(to_meta(r.parts()), r.shape, to_meta(r.new_cache(3, 4000).kv)) for r in (pair.target, pair.draft)]
        ops, seed = TimedOps(RoundKernels.of("gpu")), to_meta(torch.zeros(1, dtype=torch.int64))
        processor = Processor(law.get("temperature", 0.0))
        noise = Noise(3, to_meta(torch.arange(3)))
        deciding = KernelDeciding(processor, law.get("verifier", "rejection"), noise, seed, ops.kernels)
        asked, kv = SpecConfig.parse(config), nets[0].kv
        program = Program.of(asked, torch.device("meta"))
        lists = torch.zeros(kv.shape[0], 3, kv.shape[3], max(program.budget, 1), dtype=torch.int32)
        play(Stage(state, *nets, ops, deciding, lists={program.budget: to_meta(lists)}), program)
    return found


# the first is compiled by the test, and launches almost everything; `python tests/test_device_compile.py` compiles all
ROUNDS = [
    ("model:4+8/3,2", {"temperature": 0.8}),
    ("model:4+8/chain2", {}), ("self:4+8/chain3", {"temperature": 0.8}), ("self:4+8/3,2,1", {"temperature": 0.8}),
    ("self:4+8/chain2", {"temperature": 0.8, "verifier": "coupled"}), ("self:4+8/2,2", {}),
    ("ngram/chain4", {"temperature": 0.8}), ("self:snapkv64+8/2,2", {}),
]  # fmt: skip


@pytest.mark.slow
def test_every_launch_of_a_round_compiles(monkeypatch):
    names = compiled(ROUNDS[:1], monkeypatch)
    assert {
        "stamp_kernel", "list_kernel", "combine_kernel", "plan_kernel", "rope_kernel", "stats_kernel", "inverse_kernel",
        "tree_kernel", "residual_kernel", "compact_kernel",
    } == names  # fmt: skip


def compiled(rounds, monkeypatch):
    """Compile every launch of these rounds; the kernels' names."""
    from specdec_kernels.contract import compile_kernel

    found = {}
    for config, law in rounds:
        with monkeypatch.context() as patch:
            found |= launches(config, law, patch)
    for kernel, signature, constants, unaligned, options in found.values():
        compile_kernel(kernel, signature, constants, SM, unaligned=unaligned, name=kernel.__name__, **options)
    return {kernel.__name__ for kernel, *_ in found.values()}


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as outer:
        print(sorted(compiled(ROUNDS, outer)))
