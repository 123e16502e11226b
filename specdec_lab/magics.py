"""The notebook's door: `%specdec VERB ...`, and `%%specdec run ...` with the cell body as prompt.

A magic parses its line with the shell's parser and returns the object that a user could have made by hand; the object
displays itself. Loading this extension imports neither torch nor the view.
"""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Callable
from importlib import metadata
from typing import Any, NoReturn

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class

from .commands import display
from .commands.lab import Lab
from .commands.mistakes import UserMistake
from .commands.outcome import Outcome
from .commands.parser import NOTEBOOK, Finished, Parser, build_parser, options_of
from .commands.verbs import handle

CALL = re.compile(r"\s*%{0,2}specdec +(.*)$")


@magics_class
class SpecdecMagics(Magics):
    """`%specdec` and `%%specdec`, and what they started."""

    def __init__(self, shell: Any, load: Callable[..., Any] | None = None) -> None:
        super().__init__(shell)
        self.lab = Lab(load, variables=shell.user_ns)
        self._parser = build_parser(NOTEBOOK)
        self.matcher = matcher(self._parser)

    @line_cell_magic
    def specdec(self, line: str, cell: str | None = None) -> Any:
        try:
            return self._run(self._parse(line, cell))
        except Finished:
            return None
        except UserMistake as mistake:
            _complain(mistake)

    def _parse(self, line: str, cell: str | None) -> Namespace:
        try:
            words = shlex.split(line.strip().rstrip(";"))
        except ValueError as error:
            raise UserMistake(f"{error} in: {line.strip()}") from None
        args = self._parser.parse_args(words)
        if cell is not None:
            if args.verb != "run":
                raise UserMistake(f"a cell body is a prompt for run, not for {args.verb}; write it in one line: %specdec ...")
            if args.prompt or args.file or args.workload:
                raise UserMistake("the cell body is the prompt: leave out --prompt, --file and --workload")
            args.prompt = [cell.strip("\n")]
        return args

    def _run(self, args: Namespace) -> Any:
        given = handle(self.lab, args)
        if isinstance(given, Outcome):
            return given.data if getattr(args, "json", False) else given.value
        from .commands.background import start

        for notice in getattr(given, "notices", ()):
            print(notice)
        return start(self.lab, given)

    def close(self) -> None:
        """Stop what runs and take its displays away."""
        while self.lab.background:
            self.lab.background.popitem()[1].close()


SpecdecMagics.specdec.__doc__ = build_parser(NOTEBOOK).format_help()  # what %specdec? shows


def _complain(mistake: UserMistake) -> NoReturn:
    """One line, no traceback: IPython prints a UsageError so."""
    raise UsageError(str(mistake)) from None


def matcher(parser: Parser) -> Callable[[CompletionContext], SimpleMatcherResult]:
    """Completion of verbs, options and choices, from the parser."""

    def complete(context: CompletionContext) -> SimpleMatcherResult:
        typed = CALL.match(context.text_until_cursor)
        if typed is None:
            return {"completions": [], "suppress": False}
        *complete_words, fragment = typed[1].split(" ")
        offered = [o for o in options_of(parser, complete_words) if o.startswith(fragment)]
        # without matched_fragment nothing is offered: the token that IPython cuts may be shorter than our word
        return {"completions": [SimpleCompletion(o) for o in offered], "matched_fragment": fragment, "suppress": bool(offered)}

    decorate: Any = context_matcher(identifier="specdec_lab")
    found: Callable[[CompletionContext], SimpleMatcherResult] = decorate(complete)
    return found


def load(shell: Any) -> None:
    """Register the magic, its completion and the displays; loading again replaces what was loaded."""
    unload(shell)
    magics = SpecdecMagics(shell)
    shell.register_magics(magics)
    shell.Completer.custom_matchers.append(magics.matcher)
    display.register(shell)
    if hasattr(shell, "kernel") and (advice := _kernel_advice()):
        print(advice)


def unload(shell: Any) -> None:
    """Stop runs, join their threads, and remove all that load added; without a load it does nothing."""
    magics = shell.magics_manager.registry.pop(SpecdecMagics.__name__, None)
    if magics is None:
        return
    magics.close()
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("specdec", None)
    if magics.matcher in shell.Completer.custom_matchers:
        shell.Completer.custom_matchers.remove(magics.matcher)
    display.unregister(shell)


def _kernel_advice() -> str:
    """One line about this kernel where there is something to know."""
    version = metadata.version("ipykernel")
    if version.startswith("7.0."):
        advice = "tables replace the live view: pip install -U ipykernel"
        return f"specdec_lab: ipykernel {version} cannot send from threads, so {advice}"
    return ""
