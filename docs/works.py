"""Write the table of docs/architectures.md: ``python docs/works.py`` (about two and a half minutes on one core).

``python docs/works.py --all`` prints a table of every architecture of tests/architectures.py and tests/decoders.py
(three quarters of an hour), and ``python docs/works.py NAME ...`` one of those named.

``python docs/works.py --directories`` writes the table in README of saved directories (tests/directories.py), each
exported and run by the command line with its defaults, and compared with transformers (about ten minutes).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from offramp import check, load, zoo

ROOT = Path(__file__).parent.parent
# Of the zoo: an exit after every block of the others takes minutes.
SMALL = ("albert", "annalog", "minilm", "translator", "vit")


def bed(name: str) -> Any:
    """A file of the test bed, which is not part of the package."""
    if (tests := str(ROOT / "tests")) not in sys.path:
        sys.path.insert(0, tests)  # its files import each other
    return importlib.import_module(name)


def row(name: str, report: check.Report) -> str:
    """One line of the table."""
    if not report.ok:
        return f"| {name} | no | {report.stage}: {(report.reason or '').split(';')[0][:110]} | | | | | |"
    stacks = ", ".join(f"{stack.name} {stack.blocks}{' (cached)' if stack.cached else ''}" for stack in report.stacks)
    errors = [report.max_error[key] for key in ("chain", "exits", "cache", "other_shapes")]
    shown = " | ".join("" if error is None else f"{error:.0e}" for error in errors)
    same = report.agreement.get("answers")
    encoded = f"{report.max_error['precision']:.3f}" + ("" if same is None else f", {same:.1%}")
    return f"| {name} | yes | {stacks} | {shown} | {encoded} |"


HEAD = (
    "| model | works | stacks and their blocks | chain | exits | cache | other shapes | int8: loss, same answers |\n"
    "|---|---|---|---|---|---|---|---|"
)


def directories() -> None:
    """README's table of saved directories, by task; every directory on stderr as it comes."""
    known, cases = bed("directories").DIRECTORIES, bed("directory_cases")
    classes: dict[str, list[str]] = {}
    worst: dict[str, float] = {}
    for name, directory in sorted(known.items(), key=lambda item: item[1].task):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            case = cases.exported(name, Path(folder))
            if directory.generates:
                chain, ways = load(case.bundle), [(rows, beams) for rows in (1, 3) for beams in (None, 3)]
                same = [made == wanted for made, wanted in (cases.generated(case, chain, *way) for way in ways)]
                error = 0.0 if all(same) else float("inf")
            else:
                error = cases.run_error(case, directory.rows[-1], Path(folder) / "outputs")
        classes.setdefault(directory.task, []).append(type(case.model).__name__)
        worst[directory.task] = max(worst.get(directory.task, 0.0), error)
        print(f"{name}: {error:.0e}", file=sys.stderr, flush=True)
    lines = ["| task | classes | against transformers |", "|---|---|---|"]
    for task, names in classes.items():
        found = f"outputs within {worst[task]:.0e}" if worst[task] else "the same tokens, greedy and beams"
        lines.append(f"| {task} | {', '.join(names)} | {found} |")
    print(*lines, sep="\n")
    readme = ROOT / "README.md"
    written(readme, "directories", lines)
    readme.write_text(re.sub(r"\d+ directories", f"{len(known)} directories", readme.read_text()))


def written(page: Path, place: str, lines: list[str]) -> None:
    """Put lines into a page between its two marks of this name."""
    start, end = f"<!-- {place} -->", f"<!-- /{place} -->"
    text = page.read_text()
    page.write_text(f"{text.split(start)[0]}{start}\n" + "\n".join(lines) + f"\n{end}{text.split(end)[1]}")


def main() -> None:
    """Check, print, and write where nothing was named."""
    if sys.argv[1:] == ["--directories"]:
        directories()
        return
    beds = [bed("architectures"), bed("decoders")]
    models: dict[str, Any] = {f"zoo:{name}": f"zoo:{name}" for name in zoo.names()}
    required = {name: model for name, model in models.items() if name.removeprefix("zoo:") in SMALL}
    for one in beds:
        required |= one.REQUIRED
        models |= one.REQUIRED | one.OTHERS | {name: factory for name, (factory, _) in one.NOT_CAPTURED.items()}
    named = list(models) if sys.argv[1:] == ["--all"] else sys.argv[1:]
    lines = [HEAD]
    print(HEAD)
    for name in named or required:
        model = models[name]
        module, inputs = (model, None) if isinstance(model, str) else model()
        report = check.check(module, inputs, name=name, precision="int8", loss=math.inf)
        lines.append(row(name, report))
        print(lines[-1], flush=True)
    if not named:
        written(ROOT / "docs" / "architectures.md", "works", lines)


if __name__ == "__main__":
    main()
