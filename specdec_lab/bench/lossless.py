"""Is the text of speculation distributed as the target's? Counted over consecutive tokens, against the law by enumeration.

A target of a few tokens, so that the chance of every text of `JOINT` tokens is known exactly. Its texts span several rounds:
noise that is used twice shows in the joint law, not in single tokens. Not known here: speed, the user's own model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine.loop import Engine
from ..engine.models.loading import load
from ..engine.sampling import Processor
from ..stream import record
from ..workload import Workload
from .provenance import made_with, provenance

SCHEMA = "specdec_lab.lossless/1"
VOCABULARY, JOINT = 5, 4
PROMPT = (1, 4, 2, 3, 3, 1)
ROWS = 3000  # sequences per run, each with noise of its own
SIGNIFICANCE = 1e-3  # of all checks together
CONFIGS = (
    "off", "self:0+1/chain2", "self:1+2/2,1", "self:snapkv2+1/chain2", "model:full/chain3", "model:0+2/chain3",
    "model:full/2,2,1", "model:0+2/3,2", "ngram/chain2", "ngram/2,1",
)  # fmt: skip
PROCESSORS = (Processor(0.9, 1.0, 0), Processor(0.9, 1.0, 3), Processor(1.3, 0.8, 0))
VERIFIERS = ("rejection", "coupled")
CONTROL = "control: the draft's own text"
FEW = 5  # expected; texts with fewer are counted together


@dataclass(frozen=True, slots=True)
class ChiSquare:
    """Pearson's statistic over texts, its degrees of freedom, and the chance of one as large if the law is right.

    statistic  None where a text was said that cannot be
    """

    statistic: float | None
    freedom: int
    p: float


@dataclass(frozen=True, slots=True)
class Check:
    """One configuration. accepted: drafted tokens that were accepted, without which nothing would have been checked."""

    config: str
    verifier: str
    processor: Processor
    samples: int
    accepted: int
    found: ChiSquare


@dataclass(frozen=True, slots=True)
class LosslessReport:
    """All checks, and controls that must fail: text of another model, which the same count has to tell apart."""

    checks: tuple[Check, ...]
    controls: tuple[Check, ...]
    header: dict[str, Any]

    @property
    def limit(self) -> float:
        """Smallest p of a single check that does not call for a doubt (Bonferroni)."""
        return SIGNIFICANCE / max(len(self.checks), 1)

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, in words; empty if nothing is."""
        wrong = [f"{_name(c)}: p = {c.found.p:.2g}" for c in self.checks if c.found.p < self.limit]
        idle = [f"{_name(c)}: no draft was accepted" for c in self.checks if c.config != "off" and not c.accepted]
        blind = [f"{_name(c)} was not told apart: p = {c.found.p:.2g}" for c in self.controls if c.found.p >= self.limit]
        return (*wrong, *idle, *blind)

    def __str__(self) -> str:
        about = self.header
        title = (
            f"chi-square of the joint counts of {JOINT} consecutive tokens over {VOCABULARY} tokens against exact enumeration; "
            f"{about['samples']:,} texts each"
        )
        head = f"{'configuration':<30} {'verifier':<10} {'law':<22} {'accepted':>8} {'chi2':>10} {'freedom':>7} {'p':>8}"
        rows = [_row(check) for check in (*self.checks, *self.controls)]
        verdict = "; ".join(self.faults) or (
            f"all {len(self.checks)} follow the target's law (none below {self.limit:.1g}, one chance in "
            f"{1 / SIGNIFICANCE:.0f} for all together); the controls were told apart"
        )
        made = f"{about['device']}, attention by {about['backend']}, {made_with(about)}"
        return "\n".join([title, head, *rows, verdict, made])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, one row of the bench folder."""
        return {
            "schema": SCHEMA, **self.header, "checks": [asdict(c) for c in self.checks],
            "controls": [asdict(c) for c in self.controls], "limit": self.limit, "faults": list(self.faults),
        }  # fmt: skip


def _name(check: Check) -> str:
    return f"{check.config} ({check.verifier}, {_law(check.processor)})"


def _law(processor: Processor) -> str:
    cut = f", top-p {processor.top_p:g}" if processor.top_p < 1 else f", top-k {processor.top_k}" if processor.top_k else ""
    return f"T = {processor.temperature:g}{cut}"


def _row(check: Check) -> str:
    found = check.found
    statistic = "impossible" if found.statistic is None else f"{found.statistic:.1f}"
    return (
        f"{check.config:<30} {check.verifier:<10} {_law(check.processor):<22} {check.accepted:>8} {statistic:>10} "
        f"{found.freedom:>7} {found.p:>8.3g}"
    )


def chi_square(texts: Sequence[Sequence[int]], law: Sequence[float]) -> ChiSquare:
    """Counts of texts [N, JOINT] against the chance of each in the order of itertools.product."""
    from scipy import stats

    places = torch.tensor([VOCABULARY**i for i in reversed(range(JOINT))])
    seen = torch.bincount((torch.tensor(texts) * places).sum(-1), minlength=VOCABULARY**JOINT).double()
    expected = torch.tensor(law, dtype=torch.float64) * len(texts)
    rare = expected < FEW
    observed = [*seen[~rare].tolist(), float(seen[rare].sum())]
    wanted = [*expected[~rare].tolist(), float(expected[rare].sum())]
    if wanted[-1] == 0:
        if observed[-1]:
            return ChiSquare(None, len(wanted) - 1, 0.0)  # a text that cannot be was said
        observed, wanted = observed[:-1], wanted[:-1]
    result = stats.chisquare(observed, wanted)
    return ChiSquare(float(result.statistic), len(wanted) - 1, float(result.pvalue))


def exact_law(model: Any, processor: Processor) -> list[float]:
    """Chance of every text of JOINT tokens after PROMPT, from a transformers model."""
    texts = list(itertools.product(range(VOCABULARY), repeat=JOINT))
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *text] for text in texts])).logits[:, len(PROMPT) - 1 : -1]
    laws = processor.law(logits.double())
    chances: list[float] = laws.gather(-1, torch.tensor(texts)[..., None])[..., 0].prod(-1).tolist()
    return chances


def small_model(seed: int = 0, noise: float = 0.0) -> Any:
    """A random Llama of VOCABULARY tokens; `noise` makes a draft that mostly agrees with the one of the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
    )).float().eval()  # fmt: skip
    weights, wobble = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in made.parameters():
            if tensor.ndim == 2:
                tensor.normal_(0, 0.6 * tensor.shape[1] ** -0.5, generator=weights)
            tensor.add_(torch.randn(tensor.shape, generator=wobble) * noise * tensor.std())
    return made


def lossless(
    configs: Sequence[str] = CONFIGS, verifiers: Sequence[str] = VERIFIERS, processors: Sequence[Processor] = PROCESSORS, *,
    samples: int = 12_000, backend: str = "auto", device: str = "cpu", say: Callable[[str], None] = lambda line: None,
) -> LosslessReport:
    """Check every configuration under every verifier and law, then the control under every law."""
    if samples < ROWS:
        raise ValueError(f"a count of {samples} texts tells nothing apart; ask for at least {ROWS}")
    target, draft = small_model(), small_model(noise=0.4)
    engine = Engine(load(small_model(), draft, device=device), backend)
    laws = {processor: exact_law(target, processor) for processor in processors}
    checks = []
    for verifier, processor, config in itertools.product(verifiers, processors, configs):
        checks.append(_check(engine, config, verifier, processor, laws[processor], samples))
        say(_row(checks[-1]))
    alone = Engine(load(small_model(noise=0.4), device=device), backend)
    controls = [_check(alone, "off", "rejection", processor, laws[processor], samples, CONTROL) for processor in processors]
    header = {
        **provenance(), "device": engine.identity().device, "backend": engine.backend.name,
        "samples": samples, "vocabulary": VOCABULARY, "joint": JOINT,
    }  # fmt: skip
    return LosslessReport(tuple(checks), tuple(controls), header)


def _check(
    engine: Engine, config: str, verifier: str, processor: Processor, law: Sequence[float], samples: int, name: str = ""
) -> Check:
    texts: list[list[int]] = []
    accepted = 0
    for first in range(0, samples, ROWS):
        rows = range(first, min(first + ROWS, samples))
        workload = Workload(
            "law", (PROMPT,) * len(rows), JOINT, temperature=processor.temperature, top_p=processor.top_p,
            top_k=processor.top_k, verifier=verifier, stop_at_eos=False, sequence_ids=tuple(rows),
        )  # fmt: skip
        run = record(engine.steps(workload, config))
        texts += run.tokens()
        accepted += sum(sum(step.accepted) for step in run.rounds)
    return Check(name or config, verifier, processor, samples, accepted, chi_square(texts, law))
