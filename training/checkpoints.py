"""Checkpoints of a training run: written whole or not at all, and only what is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from offramp.errors import SpecError

_KEPT = 2
_WEIGHTS, _PROGRESS = "trained.safetensors", "progress.json"


class Checkpoints:
    """The folder of a run: ``step-N`` has weights, optimizer, schedule, random numbers, and how far the run was.

    ``objective`` is what the run is for.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, weights: Mapping[str, torch.nn.Parameter], objective: str
    ) -> None:
        self.folder, self.accelerator, self.weights, self.objective = folder, accelerator, weights, objective
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def found(self) -> list[Path]:
        """Those that are there, oldest first."""
        there = (path for path in self.folder.glob("step-*") if path.suffix != ".tmp")
        return sorted(there, key=lambda path: int(path.name[5:]))

    def save(self, step: int, about: Mapping[str, Any]) -> None:
        """Write one beside the others, and give it its name when it is whole; old ones go."""
        place = self.folder / f"step-{step}"
        temporary = place.with_name(f"{place.name}.tmp")
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if main:
            (temporary / _PROGRESS).write_text(json.dumps({**about, "objective": self.objective}))
            shutil.rmtree(place, ignore_errors=True)
            temporary.rename(place)
            for old in self.found()[:-_KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self) -> dict[str, Any] | None:
        """Load the newest; returns what it says about itself, None where there is none."""
        there = self.found()
        if not there:
            return None
        about: dict[str, Any] = json.loads((there[-1] / _PROGRESS).read_text())
        if (other := about.get("objective", self.objective)) != self.objective:
            raise SpecError(
                f"the checkpoint in {there[-1]} is of a run for {other}; this one is for {self.objective}",
                hint="another folder",
            )
        self.accelerator.load_state(str(there[-1]))
        return about

    def _save_weights(self, models: list[Any], weights: list[Any], directory: str) -> None:
        if self.accelerator.is_main_process:
            save_file({k: w.detach().contiguous() for k, w in self.weights.items()}, Path(directory) / _WEIGHTS)
        weights.clear()

    def _load_weights(self, models: list[Any], directory: str) -> None:
        stored = load_file(Path(directory) / _WEIGHTS)
        both = (stored, self.weights)
        there, here = ({(name, tuple(weight.shape)) for name, weight in weights.items()} for weights in both)
        if there != here:
            differing = sorted({name for name, _ in there ^ here})
            raise SpecError(
                f"the checkpoint in {directory} trains other weights: {differing[:5]}",
                hint="another folder, or the program and train= of that run",
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(stored[name])
        models.clear()
