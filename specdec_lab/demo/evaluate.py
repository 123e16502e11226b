"""Run the gates on a trained pair: `python -m specdec_lab.demo.evaluate`; EVALUATION.json appears beside the weights.

Uses transformers' LlamaForCausalLM in float32 and the shipped held-out text, never the engine. A gate that is already
in EVALUATION.json for the same weights is run again only if it is named in --gates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .. import machine
from ..records import Cell
from ..workload import held_out, read_held_out
from . import gates
from .card import fill_card
from .gates import BANDS, Text

HOME = Path(__file__).parent
CONTEXT = 8192
REPRODUCED_TOKENS = 20_000
NUM_REVISIONS, NUM_LOOPS = 16, 8  # prompts per length of gates 2 and 3, and per kind of gate 5
SAMPLED_ROWS, SAMPLED_TOKENS = 128, 100_000
HOME_FOLDER = re.compile(r"(?:/home|/Users|/root|[A-Z]:\\Users)[/\\]\w+")


class Pair:
    """The trained models of a folder, in float32, with their tokenizer and the texts to judge them by."""

    def __init__(self, folder: Path, tokens_limit: int) -> None:
        if not (folder / "target" / "config.json").exists():
            raise ValueError(f"{folder} has no target/: train one with `python -m specdec_lab.demo.train_demo target`")
        self.target = _load(folder / "target")
        self.draft = _load(folder / "draft") if (folder / "draft" / "config.json").exists() else None
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "target")
        self.tokens_limit = tokens_limit

    def encode(self, text: str) -> list[int]:
        """Token ids; long texts are no reason to warn, nobody feeds them whole."""
        tokens: list[int] = self.tokenizer.encode(text, verbose=False)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids."""
        text: str = self.tokenizer.decode(tokens)
        return text

    @property
    def models(self) -> dict[str, LlamaForCausalLM]:
        """name -> model, of those that exist."""
        return {"target": self.target} | ({} if self.draft is None else {"draft": self.draft})

    def texts(self) -> list[Text]:
        """Held-out code and manual, every document from its start."""
        kept = [t for t in read_held_out() if t.source != "revision"]
        return [Text(t.source, f"{t.source}/{t.name}", self._tensor(self.encode(t.text))) for t in kept]

    def revisions(self, length: int) -> list[Text]:
        """Texts of `length` tokens whose last quarter lies inside an edited copy of their beginning."""
        prompts = held_out("revision", Cell(NUM_REVISIONS, length + 1), self).prompts
        return [Text("revision", self._home(p), torch.tensor(p)) for p in prompts]

    def _home(self, prompt: tuple[int, ...]) -> str:
        """The revision that a prompt was cut from: prompts of one file do not count as independent."""
        beginning = self.decode(list(prompt[:40])).rstrip("\ufffd")  # may end inside a character
        return next(t.name for t in read_held_out() if t.source == "revision" and beginning in t.text)

    def _tensor(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor(tokens[: min(self.tokens_limit, CONTEXT) + 1])


def _load(folder: Path) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def _lengths(pair: Pair) -> Iterator[tuple[str, int]]:
    return ((band, last) for band, (_, last) in BANDS.items() if last <= pair.tokens_limit)


def _merge(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        into[key] = _merge(into.get(key, {}), value) if isinstance(value, dict) else value
    return into


def gate_1(pair: Pair) -> dict[str, Any]:
    """Loss by source and position, and a short loss for the tests to reproduce."""
    texts = pair.texts()
    found = gates.loss_by_position(pair.models, texts, pair.decode)
    return {**found, "reproduce": gates.sample_loss(pair.models, texts, REPRODUCED_TOKENS)}


def gate_2(pair: Pair) -> dict[str, Any]:
    """The value of context, on real documents and on revisions apart."""
    found: dict[str, Any] = {"text": gates.context_value(pair.target, pair.texts(), BANDS), "revision": {}}
    for band, length in _lengths(pair):
        _merge(found["revision"], gates.context_value(pair.target, pair.revisions(length), {band: BANDS[band]}))
    for part in found.values():
        part["passes"] = gates.is_context_worth_reading(part.get("difference", {}))
    return found


def gate_3(pair: Pair) -> dict[str, Any]:
    """First-position acceptance, on real documents and on revisions apart."""
    found: dict[str, Any] = {"text": gates.acceptance(pair.target, pair.draft, pair.texts(), BANDS), "revision": {}}
    for band, length in _lengths(pair):
        revisions = pair.revisions(length)
        _merge(found["revision"], gates.acceptance(pair.target, pair.draft, revisions, {band: BANDS[band]}))
    return found


def private_strings() -> set[str]:
    """Paths of this machine that no generated text may hold. They are compared, and never written down.

    A path of one component, such as the superuser's /root, is the same on every Unix machine and tells nothing of this one.
    """
    paths = {sys.prefix, sys.base_prefix, os.path.expanduser("~"), os.getcwd()}
    return {p for p in paths if p.count("/") > 1}


def gate_4(pair: Pair) -> dict[str, Any]:
    """The tokenizer gives every held-out text back, and sampled text holds nothing of the machine it was trained on."""
    texts = read_held_out()
    differing = [t.name for t in texts if pair.decode(pair.encode(t.text)) != t.text]
    per_row = -(-min(SAMPLED_TOKENS, SAMPLED_ROWS * pair.tokens_limit) // SAMPLED_ROWS)
    rows = gates.continuations(pair.target, [[0]] * SAMPLED_ROWS, per_row, temperature=1.0)
    sampled = "\n".join(map(pair.decode, rows))
    known = "\n".join(t.text for t in texts)
    return {
        "round_trip": {"texts": len(texts), "differing": differing},
        "sampled": {
            "tokens": sum(map(len, rows)),
            "private_strings": sum(sampled.count(p) for p in private_strings()),
            # the manual's own examples hold some; what is not one of them is for a person to look at
            "home_folders": sorted({m for m in HOME_FOLDER.findall(sampled) if m not in known}),
        },
        "passes": not differing and not any(p in sampled for p in private_strings()),
    }


def gate_5(pair: Pair) -> dict[str, Any]:
    """Share of repeated 8-grams in greedy continuations, beside that of real text of the same length."""
    found = {}
    length, num_new = min(1024, pair.tokens_limit), min(512, pair.tokens_limit)
    for kind in ("prose", "code", "revision"):
        prompts = held_out(kind, Cell(NUM_LOOPS, length), pair).prompts
        greedy = gates.continuations(pair.target, prompts, num_new, temperature=0.0)
        shares = [gates.repeated_share(row) for row in greedy]
        real = [gates.repeated_share(p[-num_new:]) for p in prompts]
        found[kind] = {"greedy": sum(shares) / len(shares), "real_text": sum(real) / len(real), "tokens": num_new}
    return found


GATES: dict[str, Callable[[Pair], dict[str, Any]]] = {"1": gate_1, "2": gate_2, "3": gate_3, "4": gate_4, "5": gate_5}


def weights_digests(folder: Path) -> dict[str, str]:
    """sha256 of each model's weights: results belong to these and to no others."""
    files = {name: folder / name / "model.safetensors" for name in ("target", "draft")}
    return {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items() if f.exists()}


def read_results(folder: Path, tokens_limit: int) -> dict[str, Any]:
    """The results in the folder that belong to its weights and to this limit; none otherwise."""
    weights, path = weights_digests(folder), folder / "EVALUATION.json"
    fresh = {"weights": weights, "tokens_limit": tokens_limit, "gates": {}}
    if not path.exists():
        return fresh
    results: dict[str, Any] = json.loads(path.read_text())
    is_same = results["weights"] == weights and results["tokens_limit"] == tokens_limit
    return results if is_same else fresh


def run(pair: Pair, folder: Path, wanted: list[str]) -> dict[str, Any]:
    """Run the wanted gates, or without any those that have no result yet; every result is written when it is there."""
    results = read_results(folder, pair.tokens_limit)
    for gate in wanted or [g for g in GATES if g not in results["gates"]]:
        print(f"gate {gate}: {GATES[gate].__doc__}", flush=True)
        results["gates"][gate] = GATES[gate](pair)
        results |= {"versions": machine.versions(), "commit": machine.commit()}
        (folder / "EVALUATION.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def passes(results: dict[str, Any]) -> bool:
    """Whether the gates that decide have passed, of those that were run: context value on real text, and gate 4."""
    decided = [results["2"]["text"]["passes"]] if "2" in results else []
    return all([*decided, results.get("4", {}).get("passes", True)])


def main(argv: list[str] | None = None) -> int:
    """Command line of the gates. Exit code 1 when a gate that decides did not pass."""
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__)
    parser.add_argument("--folder", type=Path, default=HOME, help="folder with target/ and draft/")
    parser.add_argument("--tokens-limit", type=int, default=CONTEXT, help="tokens of a text, for a quick look")
    parser.add_argument("--gates", default="", help="for example 1,2; otherwise those that have no result yet")
    arguments = parser.parse_args(argv)
    wanted = [g for g in arguments.gates.split(",") if g]
    if unknown := sorted(set(wanted) - set(GATES)):
        parser.error(f"there is no gate {', '.join(unknown)}; gates are {', '.join(GATES)}")
    if arguments.tokens_limit < 64:
        parser.error(f"--tokens-limit must be at least 64, got {arguments.tokens_limit}")
    try:
        pair = Pair(arguments.folder, arguments.tokens_limit)
    except ValueError as error:
        parser.error(str(error))
    results = run(pair, arguments.folder, wanted)
    print(fill_card(arguments.folder))
    return 0 if passes(results["gates"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
