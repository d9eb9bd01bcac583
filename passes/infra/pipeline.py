"""The pipeline: passes in order, each verified, timed and, where asked, dumped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from offramp.errors import OfframpError, PassError
from offramp.passes.infra.contract import Pass, PassResult
from offramp.passes.infra.spec import as_passes
from offramp.passes.infra.verifier import verify
from offramp.program.autocast import without_autocast
from offramp.program.program import Program, as_program

log = logging.getLogger(__name__)

Observer = Callable[[Program, Pass, PassResult], None]


@without_autocast
def apply(program: Program, passes: str | Pass | Sequence[str | Pass], *, observer: Observer | None = None) -> Program:
    """Run passes on a program: objects, or pipeline text (``"insert-exits{stack=encoder,after=2|4}"``).

    The program is verified before the first pass and after every one. With ``OFFRAMP_DUMP=dir`` in the
    environment every pass writes its graph before and after, and a list of the nodes that changed. ``observer``
    is called with the program before, the pass, and its result.

    Raises:
        SpecError: a pass, option, stack or block that is not there, or ``program`` is a module that was not captured;
            what was given is untouched.
        PassError: a pass cannot apply, or breaks its contract.
    """
    program, steps = as_program(program), as_passes(passes)
    verify(program, "before the first pass")
    for number, step in enumerate(steps, 1):
        started = time.perf_counter()
        result = _run(step, program)
        log.info("%r: %s in %.2f s", step, dict(result.edits) or "no edits", time.perf_counter() - started)
        for note in result.notes:
            log.info("%r: %s", step, note)
        if directory := os.environ.get("OFFRAMP_DUMP"):
            _dump(Path(directory), number, program, step, result)
        if observer:
            observer(program, step, result)
        program = result.program
    return program


def _run(step: Pass, program: Program) -> PassResult:
    try:
        step.requires(program)
        result = step.run(program)
        if result.modified:
            verify(result.program, f"after {step!r}")
        step.ensures(program, result)
    except OfframpError:
        raise
    except Exception as error:
        raise PassError(
            f"{step!r} failed: {type(error).__name__}: {error}",
            hint="please report this, with the cause above",
        ) from error
    return result


def _dump(directory: Path, number: int, before: Program, step: Pass, result: PassResult) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{number:02d}-{step.name}"
    (directory / f"{stem}.before.txt").write_text(f"{before.graph}\n")
    (directory / f"{stem}.after.txt").write_text(f"{result.program.graph}\n")
    old = {node.name: node.format_node() for node in before.graph.nodes}
    new = {node.name: node.format_node() for node in result.program.graph.nodes}
    changed = [f"- {old[name]}" for name in old if old[name] != new.get(name)]
    changed += [f"+ {new[name]}" for name in new if new[name] != old.get(name)]
    (directory / f"{stem}.changes.txt").write_text("\n".join([f"# {step!r} {dict(result.edits)}", *changed, ""]))
