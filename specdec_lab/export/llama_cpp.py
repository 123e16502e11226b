"""llama.cpp since the draft context was unified (pull request 22787, May 2026): flags of llama-server.

    --spec-type draft-simple --spec-draft-model d.gguf --spec-draft-n-max 5 --spec-draft-n-min 0 --spec-draft-p-min 0
    --spec-type ngram-simple --spec-ngram-simple-size-n 4 --spec-ngram-simple-size-m 5

--spec-type is none by default: without it a draft model is loaded and never used. The old --draft* flags and -cd, the
size of the draft's own context, are gone, so no window can be set. Read in llama.cpp's documentation; no llama.cpp ran
here.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from .column import NGRAM_MATCH, PLAIN, Exported, ExportError, Slice, chains_of

TYPE, DRAFT = "--spec-type", "--spec-draft-model"
MOST, LEAST, CONFIDENCE = "--spec-draft-n-max", "--spec-draft-n-min", "--spec-draft-p-min"
MATCH, COPY = "--spec-ngram-simple-size-n", "--spec-ngram-simple-size-m"
FLAGS = {"draft-simple": {TYPE, DRAFT, MOST, LEAST, CONFIDENCE}, "ngram-simple": {TYPE, MATCH, COPY}}


def export(
    piece: Slice,
    *,
    draft_model: str | None = None,
    target_model: str = "TARGET.gguf",
    drafter: str | None = None,
    batch: int = 1,
    ngram_match: tuple[int, int] = NGRAM_MATCH,
) -> Exported:
    """The flags that fix the draft length to the policy's at `batch`; models are GGUF files."""
    loaded = piece.drafter(draft_model, drafter)
    column = piece.choose(chains_of(loaded, "llama.cpp")).single(batch, "llama.cpp")
    depth, lost = column.max_depth, (*column.lost, *column.lost_views("llama.cpp"))
    serve = ["llama-server", "-m", target_model]
    if not depth:
        return Exported("llama_cpp", {}, shlex.join(serve), lost, PLAIN)
    if loaded == "ngram":
        flags = {TYPE: "ngram-simple", MATCH: ngram_match[1], COPY: depth}
        lost += (f"ngram: llama.cpp matches exactly {ngram_match[1]} tokens, the policy's matches start at {ngram_match[0]}",)
    else:
        flags = {TYPE: "draft-simple", DRAFT: draft_model or "", MOST: depth, LEAST: 0, CONFIDENCE: 0}
    argv = [str(part) for pair in flags.items() for part in pair]
    validate(argv)
    return Exported("llama_cpp", {}, shlex.join([*serve, *argv]), lost)


def validate(argv: Sequence[str]) -> None:
    """Raise ExportError where llama-server would reject the flags, never draft, or draft another length."""
    if len(argv) % 2:
        raise ExportError(f"{shlex.join(argv)!r}: every flag here takes one value, and one is missing")
    flags = dict(zip(argv[::2], argv[1::2], strict=True))
    kind = flags.get(TYPE, "none")
    if kind not in FLAGS:
        raise ExportError(f"{TYPE} {kind}: llama.cpp would not draft as measured. Write one of: {', '.join(FLAGS)}")
    if set(flags) != FLAGS[kind]:
        raise ExportError(
            f"{', '.join(sorted(set(flags) ^ FLAGS[kind]))}: not a flag of {kind}, or missing. llama.cpp refuses removed "
            f"flags and fills in missing ones. Give exactly {', '.join(sorted(FLAGS[kind]))}"
        )
    for flag in (MOST, MATCH, COPY):
        if flag in flags and (not flags[flag].isdigit() or int(flags[flag]) < 1):
            raise ExportError(f"{flag} must be a whole number above 0, got {flags[flag]!r}")
    for flag, harm in ((LEAST, "throws short drafts away"), (CONFIDENCE, "stops drafts early")):
        if flags.get(flag, "0") != "0":
            raise ExportError(f"{flag} {flags[flag]} {harm}. Write 0")
