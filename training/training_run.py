"""The state of a training run: its steps, its curve, and its checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from offramp.errors import SpecError, TrainingError
from offramp.training.batches import Batch, Batches, epoch_of, once, shown, tensors
from offramp.training.checkpoints import Checkpoints
from offramp.training.objective_module import ObjectiveModule

_CURVE = "curve.jsonl"


@dataclass(frozen=True)
class CurvePoint:
    """One point of the curve: means since the point before.

    Attributes:
        step: How many steps of the optimizer are done.
        epoch: Passes over the batches: a fraction, or how many are done where the batches have no length.
        loss: The sum of the losses.
        losses: The losses by name.
        rate: The learning rate.
        seconds: Wall time since the first step, that of earlier runs included.
    """

    step: int
    epoch: float
    loss: float
    losses: Mapping[str, float]
    rate: float
    seconds: float


class TrainingRun:
    """Goes through batches to the end; ``curve`` is what came of it."""

    def __init__(
        self,
        accelerator: Accelerator,
        plain: ObjectiveModule,
        model: torch.nn.Module,
        optimizer: Any,
        schedule: Any,
        weights: Mapping[str, torch.nn.Parameter],
        checkpoints: Checkpoints | None,
        every: int,
        log_every: int,
        progress: Callable[[CurvePoint], None] | None,
        clip: float,
        length: int,
    ) -> None:
        self.program, self.objective = plain.program, type(plain.objective).__name__
        self.accelerator, self.model, self.optimizer, self.schedule = accelerator, model, optimizer, schedule
        self.weights, self.checkpoints, self.every, self.log_every = weights, checkpoints, every, log_every
        self.progress, self.clip, self.length = progress, clip, length
        self.step = self.epoch = self.batch = 0
        self.before = 0.0  # seconds of earlier runs
        self.sums, self.seen = dict[str, float](), 0  # of the losses since the last point, and of how many batches
        self.curve: list[CurvePoint] = []

    def through(self, batches: Batches, total: int, seed: int) -> None:
        """Train to the end, from the last checkpoint on."""
        restore, resumed = self._resume(), True
        started = time.perf_counter()
        while self.step < total:
            torch.manual_seed(seed + self.epoch)
            skip = self.batch
            for batch in self._mine(batches, skip):
                if resumed:
                    restore()
                    resumed = False
                losses = self._one(batch)
                self.batch += 1
                self.seen += 1
                for name, value in losses.items():
                    self.sums[name] = self.sums.get(name, 0.0) + value
                if not self.accelerator.sync_gradients:
                    continue
                self.step += 1
                if self.step % self.log_every == 0 or self.step == total:
                    self._log(started)
                if self.checkpoints and (self.step % self.every == 0 or self.step == total):
                    self._save(self.checkpoints, started)
                if self.step == total:
                    return
            if self.batch == 0 or once(batches):
                self._ended(batches, total)
            self.epoch, self.batch = self.epoch + 1, 0

    def _ended(self, batches: Batches, total: int) -> NoReturn:
        """Raise a SpecError that says why there are no more batches."""
        if not self.step and not self.batch:
            raise SpecError("there are no batches", hint="a list or a DataLoader that is not empty")
        raise SpecError(
            f"the batches ended after {self.step} of {total} steps"
            + (
                f", {self.batch} batches: a {type(batches).__name__} can be gone through once only"
                if self.batch
                else ""
            ),
            hint="a list, or a function that makes the batches of an epoch: fit(program, lambda: batches(...), ...)",
        )

    def _mine(self, batches: Batches, skip: int) -> Iterator[Batch]:
        """This process's share of an epoch, from batch ``skip`` on, on its device."""
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        given = islice(epoch_of(batches, self.epoch), skip * count, None)
        while len(shares := list(islice(given, count))) == count:  # every process has one, or none has
            with self._named():
                batch = tensors(self.program, shares[rank], self.accelerator.device)
            yield batch

    def _one(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, and a step where enough batches have been accumulated."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            losses = self._losses(batch)
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            if not all(map(math.isfinite, values.values())):
                raise self._broken(f"the loss is not finite: {values}")
            accelerator.backward(sum(losses.values()))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(list(self.weights.values()), self.clip)
                if accelerator.mixed_precision != "fp16" and not math.isfinite(float(norm)):
                    raise self._broken(f"the gradient is not finite (norm {float(norm)})")
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
        return values

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """Those of a batch, of which something depends on what is trained."""
        try:
            with self._named():
                found: Any = self.model(batch, self.step)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, KeyError) as error:
            raise SpecError(
                f"{self._where}: {self.objective} could not be computed: {type(error).__name__}: {error}",
                hint=f"what the program takes; the batch has {shown(batch)}",
            ) from error
        if not isinstance(found, Mapping) or not found or not all(map(_scalar, found.values())):
            raise SpecError(
                f"{self.objective} made {found!r}: scalar tensors by name are needed", hint='{"loss": loss.mean()}'
            )
        if not any(loss.requires_grad for loss in found.values()):
            raise SpecError(
                f"{self._where}: nothing that is trained changes the losses {list(found)} of {self.objective}; trained "
                f"are {', '.join(list(self.weights)[:3])}" + (", ..." if len(self.weights) > 3 else ""),
                hint="train='all', or an objective that reads what the passes have added (DeepSupervision or "
                "SelfDistillation for exits, LearnedGates for gates)",
            )
        return dict(found)

    @property
    def _where(self) -> str:
        return f"step {self.step + 1} (epoch {self.epoch}, batch {self.batch})"

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say which batch it is in errors about one."""
        try:
            yield
        except SpecError as error:
            raise SpecError(f"{self._where}: {error.reason}", hint=error.hint) from error

    def _broken(self, what: str) -> TrainingError:
        kept = self.checkpoints.found() if self.checkpoints else []
        return TrainingError(
            f"{self._where}: {what}",
            hint="a lower rate, a longer warmup, or precision='no'; "
            + (f"the last good checkpoint is {kept[-1]}" if kept else "with folder= there would be checkpoints"),
        )

    def _log(self, started: float) -> None:
        means = {name: total / self.seen for name, total in self.sums.items()}
        self.sums, self.seen = {}, 0
        rate = float(self.schedule.get_last_lr()[0])
        seconds = self.before + time.perf_counter() - started
        epoch = round(self.epoch + (self.batch / self.length if self.length else 0), 4)
        point = CurvePoint(self.step, epoch, sum(means.values()), means, rate, round(seconds, 3))
        self.curve.append(point)
        if not self.accelerator.is_main_process:
            return
        if self.checkpoints:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            with (self.checkpoints.folder / _CURVE).open("a") as file:
                file.write(json.dumps(asdict(point)) + "\n")
        if self.progress:
            self.progress(point)

    def _save(self, checkpoints: Checkpoints, started: float) -> None:
        where = {"step": self.step, "epoch": self.epoch, "batch": self.batch}
        seconds = self.before + time.perf_counter() - started
        checkpoints.save(self.step, {**where, "seconds": seconds, "sums": self.sums, "seen": self.seen})

    def _resume(self) -> Callable[[], None]:
        """Go on from the last checkpoint, if there is one; returns what sets the random numbers to its state."""
        if self.checkpoints is None:
            return lambda: None
        about = self.checkpoints.load()
        if about is not None:
            self.step, self.epoch, self.batch = about["step"], about["epoch"], about["batch"]
            self.before, self.sums, self.seen = about["seconds"], about.get("sums", {}), about.get("seen", 0)
        file = self.checkpoints.folder / _CURVE
        points = list(_points(file))
        self.curve = [point for point in points if point.step <= self.step]
        if points and self.accelerator.is_main_process:
            file.write_text("".join(json.dumps(asdict(point)) + "\n" for point in self.curve))
        state, devices = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

        def restore() -> None:
            if about is not None:
                torch.set_rng_state(state)
                if devices:
                    torch.cuda.set_rng_state_all(devices)

        return restore


def _points(file: Path) -> Iterator[CurvePoint]:
    """The points of a curve that is on disk; the last one may be half written."""
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            yield CurvePoint(**json.loads(line))
        except json.JSONDecodeError:
            return


def _scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
