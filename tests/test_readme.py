"""The examples of README and docs/training.md run as they stand, and CONTRIBUTING's pass does what it says."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch

import offramp
from offramp import zoo

ROOT = Path(__file__).parent.parent


def python_blocks(file: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        zoo.load("minilm")
    except zoo.ZooError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    words = ["a", "film", "of", "great", "warmth", "and", "little", "sense", "that", "nobody", "needed", "twice"]
    dice = random.Random(0)
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(dice.sample(words, 9)) for _ in range(200)))
    names = {"__name__": "readme"}
    for file in ("README.md", "docs/training.md"):
        for block in python_blocks(file):
            exec(compile(block, file, "exec"), names)
    first, *tokens, width, chosen, verdict = capsys.readouterr().out.splitlines()
    assert first.startswith("(2, 2) [")
    assert 0 < int(width.partition("%")[0]) <= 100
    assert chosen.split("(")[0] in ("Confidence", "Never")
    assert verdict.split(":")[0] in ("yes", "no")
    assert 2 <= len(tokens) <= 16
    assert all(line.split()[2] == "8" and line.endswith(" ms") for line in tokens)


def test_the_pass_of_contributing_works(encoder: object) -> None:
    block, _ = python_blocks("CONTRIBUTING.md")
    header = """
        from dataclasses import dataclass, replace
        from typing import ClassVar
        from offramp.passes.infra.contract import Pass, PassResult, stack_named
        from offramp.passes.infra.editor import Editor
        from offramp.program import Exit, Program
        from offramp.program.graph import aten
        from offramp.program.record import exchanged
        from offramp.errors import SpecError
    """
    names: dict[str, type[offramp.passes.Pass]] = {"__name__": "__main__"}  # type: ignore[dict-item]
    exec(compile(textwrap.dedent(header) + block, "CONTRIBUTING.md", "exec"), names)
    program: offramp.Program = encoder.program  # type: ignore[attr-defined]
    scale = names["ScaleExits"]
    with pytest.raises(offramp.errors.SpecError, match="no exits"):
        offramp.apply(program, scale())
    exits = offramp.apply(program, "insert-exits")
    scaled = offramp.apply(exits, scale(percent=50))  # type: ignore[call-arg]
    before, after = (p.module(**p.example_inputs) for p in (exits, scaled))
    for item in exits.exits:
        assert all((before[key] != after[key]).any() for key in item.outputs.values())
    assert scaled.history[-1] == "scale-exits{percent=50}"


def test_the_lowering_of_contributing_works(tmp_path: Path) -> None:
    _, block = python_blocks("CONTRIBUTING.md")

    @torch.library.custom_op("mine::squared_relu", mutates_args=())
    def squared_relu(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) ** 2

    @squared_relu.register_fake
    def like(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Squared(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = squared_relu(x)
            return made

    model = tiny.seeded(tiny.Encoder)
    for each in model.blocks:
        each.mlp[1] = Squared()
    program = offramp.capture(model, tiny.text())
    header = "import torch\nfrom torch import fx\nfrom offramp.export.lowering.node_builder import Builder\n"
    header += "aten = torch.ops.aten\n"
    exec(compile(header + block, "CONTRIBUTING.md", "exec"), {"__name__": "__main__"})
    offramp.save(program, tmp_path / "m.offramp")  # which compares with torch


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_what_writes_the_tables_of_architectures_finds_them() -> None:
    code = "import works; print(*(works.bed(name).__name__ for name in ('architectures', 'decoders', 'directories')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True, check=False)
    assert done.stdout == "architectures decoders directories\n", done.stderr
