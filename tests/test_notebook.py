"""The notebook's cells run in order, with a smaller model than it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"
SMALL = {"WIDTH": 32, "BLOCKS": 3, "STEPS": 24, "EXAMPLES": 300}


@pytest.mark.slow
def test_the_quickstart_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("MPLBACKEND", "agg")
    pytest.importorskip("matplotlib")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        if not number:
            assert names.keys() >= SMALL.keys()
            names |= SMALL
    names["plt"].close("all")
    printed = capsys.readouterr().out
    assert "encoder: 3 blocks" in printed
    assert "# majority" in printed
    assert "calibrated: " in printed
    assert all(cell["outputs"] for cell in cells[1:]), "a cell was committed without its output"
