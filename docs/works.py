"""Write the table of docs/architectures.md: ``python docs/works.py`` (about eight minutes on two cores).

``python docs/works.py --all`` prints a table of every architecture of tests/architectures.py and tests/decoders.py
(three quarters of an hour), and ``python docs/works.py NAME ...`` one of those named.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from offramp import check, zoo

ROOT = Path(__file__).parent.parent
# Of the zoo: an exit after every block of the others takes minutes.
SMALL = ("albert", "annalog", "minilm", "translator", "vit")
PAGE = ROOT / "docs" / "architectures.md"
START, END = "<!-- works -->", "<!-- /works -->"


def bed(name: str) -> Any:
    """A file of the test bed, which is not part of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def row(name: str, report: check.Report) -> str:
    """One line of the table."""
    if not report.ok:
        return f"| {name} | no | {report.stage}: {(report.reason or '').split(';')[0][:110]} | | | | |"
    stacks = ", ".join(f"{stack.name} {stack.blocks}{' (cached)' if stack.cached else ''}" for stack in report.stacks)
    errors = [report.max_error[key] for key in ("chain", "exits", "cache", "other_shapes")]
    shown = " | ".join("" if error is None else f"{error:.0e}" for error in errors)
    return f"| {name} | yes | {stacks} | {shown} |"


HEAD = (
    "| model | works | stacks and their blocks | chain | exits | cache | other shapes |\n|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Check, print, and write where nothing was named."""
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
        report = check.check(model) if isinstance(model, str) else check.check(*model(), name=name)
        lines.append(row(name, report))
        print(lines[-1], flush=True)
    if not named:
        page, table = PAGE.read_text(), "\n".join(lines)
        PAGE.write_text(f"{page.split(START)[0]}{START}\n{table}\n{END}{page.split(END)[1]}")


if __name__ == "__main__":
    main()
