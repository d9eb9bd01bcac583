"""Write the table of what works: ``python docs/works.py [NAME ...]`` checks models and rewrites docs/works.md.

Without names: the zoo and every architecture of tests/architectures.py (about half an hour on two cores).
README.md shows the zoo and the architectures that must work.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from offramp import check, zoo

ROOT = Path(__file__).parent.parent
START, END = "<!-- works -->", "<!-- /works -->"


def architectures() -> Any:
    """The test bed, which is not part of the package."""
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "tests" / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module
    spec.loader.exec_module(module)
    return module


def row(name: str, report: check.Report) -> str:
    """One line of the table."""
    if not report.ok:
        return f"| {name} | no | {report.stage}: {(report.reason or '').split(';')[0][:110]} | | | |"
    stacks = ", ".join(f"{stack.name} {stack.blocks}" for stack in report.stacks)
    errors = [report.max_error[key] for key in ("chain", "exits", "other_shapes")]
    shown = " | ".join("" if error is None else f"{error:.0e}" for error in errors)
    return f"| {name} | yes | {stacks} | {shown} |"


def main() -> None:
    """Check and write."""
    bed = architectures()
    models: dict[str, Any] = {f"zoo:{name}": f"zoo:{name}" for name in zoo.names()}
    models |= bed.REQUIRED | bed.OTHERS | {name: factory for name, (factory, _) in bed.NOT_CAPTURED.items()}
    first = [*[name for name in models if name.startswith("zoo:")], *bed.REQUIRED]
    lines = {}
    for name in sys.argv[1:] or models:
        model = models[name]
        report = check.check(model) if isinstance(model, str) else check.check(*model(), name=name)
        lines[name] = row(name, report)
        print(lines[name], flush=True)
    head = "| model | works | stacks and their blocks | chain | exits | other shapes |\n|---|---|---|---|---|---|\n"
    if not sys.argv[1:]:
        works = sum(" | yes | " in line for line in lines.values())
        text = "# What works\n\nFrom `python docs/works.py`: largest errors, relative to the output's scale.\n"
        text += f"{works} of {len(lines)} work.\n\n{head}" + "\n".join(lines.values()) + "\n"
        (ROOT / "docs" / "works.md").write_text(text)
        readme = (ROOT / "README.md").read_text()
        before, after = readme.split(START)[0], readme.split(END)[1]
        table = "\n".join(lines[name] for name in first)
        (ROOT / "README.md").write_text(f"{before}{START}\n{head}{table}\n{END}{after}")


if __name__ == "__main__":
    main()
