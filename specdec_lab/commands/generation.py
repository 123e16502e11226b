"""`run`: continue prompts, watch the steps, read the text."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import Run, SpecConfig
from ..workload import NEEDLE, Sampling, Workload, from_file, from_text, make, random_context, retrieved, why_not
from .files import writable_file
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import INTERRUPTED, OK, Outcome, StreamJob

if TYPE_CHECKING:
    from ..engine.loop import Engine
    from ..engine.models.loading import ModelPair
    from ..policy import Policy


def run(lab: Lab, args: Namespace) -> StreamJob:
    """One stream of the workload under the configuration, with its trace and timeline if they were asked for."""
    from ..trace import TraceWriter

    lab.check_idle("run")
    _check_source(args)
    timeline = writable_file(args.perfetto, ".json", ".json.gz") if args.perfetto else None
    with asked():
        config = configuration(args.config)
    engine = lab.engine_for(args)
    with asked():
        workload = _workload(engine, args)
        stream = engine.steps(workload, config)
        trace = [TraceWriter(writable_file(args.trace, ".jsonl", ".jsonl.gz"), stream.header)] if args.trace else []
    pair = engine.pair

    def conclude(runs: Sequence[Run]) -> Outcome:
        return _conclude(runs, pair, timeline, workload)

    title = f"{args.config} on {workload.name} {workload.cell}"
    return StreamJob("run", title, (stream,), conclude, lambda header: trace, texts=lambda runs: texts(runs, pair))


def sampling_of(args: Namespace) -> Sampling:
    """The sampling options as a workload takes them."""
    return Sampling(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed, verifier=args.verifier
    )


def configuration(text: str) -> SpecConfig | Policy:
    """A spelling, or the policy in a file that ends in .json."""
    if not text.endswith(".json"):
        return SpecConfig.parse(text)
    from ..policy import Policy

    return Policy.load(text)


def _check_source(args: Namespace) -> None:
    """Mistakes that need no model to be seen."""
    if args.prompt is None and args.file is None and args.workload is None:
        raise UserMistake("run needs something to continue: --prompt TEXT, --file FILE, or --workload KIND --cell 1x1024")
    if args.workload is not None and args.cell is None:
        raise UserMistake(f"--workload {args.workload} needs --cell, batch and prompt length, for example --cell 1x1024")
    if args.workload is None and args.cell is not None:
        raise UserMistake("--cell belongs to --workload: your own prompts have their own number and length")
    if args.prompt is not None and not all(args.prompt):
        raise UserMistake("the prompt is empty: there is nothing to continue")


def _workload(engine: Engine, args: Namespace) -> Workload:
    pair, sampling = engine.pair, sampling_of(args)
    if args.workload is not None:  # before the text of millions of prompts is made
        engine.check_memory(args.cell.batch, args.cell.length + args.max_new_tokens)
    if args.workload == "random":
        return random_context(args.cell, pair.target.shape.vocab, max_new_tokens=args.max_new_tokens, **sampling)
    if args.workload is not None:
        if reason := why_not(args.workload, pair.tokenizer, pair.target.shape.vocab, pair.name):
            raise UserMistake(reason)
        return make(args.workload, args.cell, pair.tokenizer, max_new_tokens=args.max_new_tokens, **sampling)
    if pair.tokenizer is None:
        raise UserMistake(f"{pair.name} was loaded without a tokenizer and cannot read text; load a folder that holds one, or "
                        "give it --workload random --cell 1x1024")
    if args.file is not None and args.file != "-":
        return from_file(args.file, pair.tokenizer, max_new_tokens=args.max_new_tokens, **sampling)
    prompts = args.prompt or [sys.stdin.read()]
    return from_text(prompts, pair.tokenizer, max_new_tokens=args.max_new_tokens, **sampling)


def texts(runs: Sequence[Run], pair: ModelPair) -> list[str]:
    """What the runs generated, one text per prompt."""
    if pair.tokenizer is None:
        return []
    return [pair.tokenizer.decode(tokens) for run in runs for tokens in run.tokens()]


def _conclude(runs: Sequence[Run], pair: ModelPair, timeline: Path | None, workload: Workload) -> Outcome:
    from ..summary import compare, summarize
    from ..trace import write_perfetto
    from ..view.tables import render_table

    if timeline is not None and runs:
        write_perfetto(runs[0], timeline)
    generated = texts(runs, pair)
    data: dict[str, Any] = {"texts": generated, "tokens": [row for run in runs for row in run.tokens()]}
    if runs:
        data |= {"summary": summarize(runs[0]).to_dict(), "header": runs[0].header.to_dict()}
        data["interrupted"] = runs[0].interrupted
    found = retrieved(workload, runs[0].tokens()) if runs and workload.name == NEEDLE else []
    if found:
        data["retrieved"] = found
    blocks = [f"--- {i + 1} ---\n{text}" for i, text in enumerate(generated)] if len(generated) > 1 else generated
    said = [f"said of the value asked for: {', '.join(f'{share:.0%}' for share in found)}"] if found else []
    words = "\n\n".join([*blocks, *said, render_table(compare(runs))])
    return Outcome(runs, words, data, INTERRUPTED if any(run.interrupted for run in runs) else OK)
