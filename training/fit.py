"""``fit``: the training loop. Devices, precision, accumulation and processes are accelerate's business."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.program.program import Program
from offramp.runtime.errors import SpecError, TrainingError
from offramp.training.learner import Batch, Learner
from offramp.training.objectives import Objective
from offramp.training.weights import added

_KEPT = 2  # checkpoints
_WEIGHTS = "trained.safetensors"


@dataclass(frozen=True)
class Point:
    """One point of the curve: means since the point before.

    Attributes:
        step: How many steps of the optimizer are done.
        epoch: Passes over the batches, a fraction.
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


def fit(
    program: Program,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    epochs: int = 1,
    steps: int | None = None,
    train: Literal["added", "all"] = "added",
    rate: float = 1e-3,
    warmup: int = 0,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
    clip: float = 1.0,
    precision: Literal["no", "bf16", "fp16"] = "no",
    accumulate: int = 1,
    folder: str | os.PathLike[str] | None = None,
    every: int = 500,
    progress: Callable[[Point], None] | None = None,
    log_every: int = 50,
    seed: int = 0,
) -> tuple[Point, ...]:
    """Train a rewritten program in place; the captured model shares its weights.

    Args:
        program: what to train; capture it with ``training=True`` if its dropout is to stay.
        batches: mappings from names to tensors: the program's inputs, and what the objective reads (``labels``). It is
            gone through once an epoch, after ``set_epoch(epoch)`` if it has that; torch's random numbers start anew
            with each epoch. Of several processes each takes its share of the batches.
        objective: what is minimised; see ``offramp.training.objectives``.
        epochs: how often to go through the batches.
        steps: stop after so many steps of the optimizer, whatever ``epochs`` says; needed where batches have no length.
        train: "added" trains only what passes have added, and no bit of the model; "all" trains everything.
        rate: the greatest learning rate; it rises for ``warmup`` steps and falls to zero along a cosine.
        optimizer: makes one of the weights that are trained; None for AdamW without weight decay.
        clip: the greatest norm of the gradient.
        precision: accelerate's mixed precision.
        accumulate: batches a step.
        folder: where checkpoints and ``curve.jsonl`` go. A run that finds a checkpoint there goes on from it.
        every: steps between checkpoints.
        progress: called with each point, by the main process.
        log_every: steps between points.
        seed: of torch's random numbers.

    Returns:
        The curve, earlier runs of the same folder included.

    Raises:
        SpecError: the program, the batches and the objective do not fit.
        TrainingError: a loss or a gradient is not finite; the last checkpoint is kept.
    """
    if program.cache is not None:
        raise SpecError("the program has caches, which training does not need", hint="train first, insert-cache then")
    objective.check(program)
    total = _total(batches, epochs, steps, accumulate)
    AcceleratorState._reset_state()  # of an earlier run, which may have had another precision
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        step_scheduler_with_optimizer=False,
    )
    learner = Learner(program, objective)
    weights = _chosen(program, learner, train)
    made = optimizer(list(weights.values())) if optimizer else torch.optim.AdamW(weights.values(), rate, weight_decay=0)
    shape = torch.optim.lr_scheduler.LambdaLR(made, lambda step: _schedule(step, warmup, total))
    prepared = accelerator.prepare(learner, made, shape)
    run = _Run(accelerator, *prepared, weights, Path(folder) if folder else None, every, log_every, progress, clip)
    where = next(learner.parameters()).device
    learner.train(train == "all")
    try:
        run.through(batches, total, seed)
    finally:
        learner.eval()
        for weight in program.graph_module.parameters():
            weight.requires_grad_(True)
        accelerator.free_memory()
        learner.to(where if accelerator.num_processes == 1 else "cpu")
    return tuple(run.curve)


def _total(batches: Iterable[Batch], epochs: int, steps: int | None, accumulate: int) -> int:
    """How many steps of the optimizer there will be."""
    if steps is not None:
        return steps
    if not hasattr(batches, "__len__"):
        raise SpecError("batches have no length", hint="say how many steps=")
    count = len(batches)
    if not count:
        raise SpecError("there are no batches")
    return epochs * count // accumulate


def _schedule(step: int, warmup: int, total: int) -> float:
    """The share of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _chosen(program: Program, learner: Learner, train: str) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained; no other gets a gradient."""
    if train not in ("added", "all"):
        raise SpecError(f"train={train!r}: there are added and all")
    every = dict(learner.module.named_parameters())
    chosen = added(program) if train == "added" else every
    if not chosen:
        raise SpecError(
            "the passes have added no weights to train",
            hint="insert-adapter, insert-scores{measure=learned} or insert-exits{head=own}; or train='all'",
        )
    for name, weight in every.items():
        weight.requires_grad_(name in chosen)
    return chosen


class _Run:
    """The state of a training run, and its checkpoints."""

    def __init__(
        self,
        accelerator: Accelerator,
        learner: torch.nn.Module,
        optimizer: Any,
        schedule: Any,
        weights: Mapping[str, torch.nn.Parameter],
        folder: Path | None,
        every: int,
        log_every: int,
        progress: Callable[[Point], None] | None,
        clip: float,
    ) -> None:
        self.accelerator, self.learner, self.optimizer, self.schedule = accelerator, learner, optimizer, schedule
        self.weights, self.folder, self.every, self.log_every = weights, folder, every, log_every
        self.progress, self.clip = progress, clip
        self.step = self.epoch = self.batch = 0
        self.before = 0.0  # seconds of earlier runs
        self.curve: list[Point] = []
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def through(self, batches: Iterable[Batch], total: int, seed: int) -> None:
        """Train to the end, from the last checkpoint on."""
        resumed = self._resume()
        started, sums, seen = time.perf_counter(), dict[str, float](), 0
        while self.step < total:
            torch.manual_seed(seed + self.epoch)
            skip = self.batch
            for batch in self._mine(batches, skip):
                if resumed is not None:  # the state in which the checkpoint left the random numbers
                    resumed()
                    resumed = None
                losses = self._one(batch)
                self.batch += 1
                seen += 1
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value
                if not self.accelerator.sync_gradients:
                    continue
                self.step += 1
                if self.step % self.log_every == 0 or self.step == total:
                    length = getattr(batches, "__len__", lambda: 0)()
                    self._log(sums, seen, self.epoch + self.batch / length if length else 0.0, started)
                    sums, seen = {}, 0
                if self.folder and (self.step % self.every == 0 or self.step == total):
                    self._checkpoint(self.before + time.perf_counter() - started)
                if self.step == total:
                    return
            if self.batch == 0:
                raise SpecError("there are no batches")
            self.epoch, self.batch = self.epoch + 1, 0

    def _mine(self, batches: Iterable[Batch], skip: int) -> Iterator[Batch]:
        """This process's share of an epoch, from batch ``skip`` on, on its device."""
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(self.epoch)
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        for batch in islice(iter(batches), skip * count + rank, None, count):
            yield {name: value.to(self.accelerator.device) for name, value in batch.items()}

    def _one(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, and a step where enough batches have been accumulated."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.learner):
            losses: dict[str, Tensor] = self.learner(batch, self.step)
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

    def _broken(self, what: str) -> TrainingError:
        kept = self._checkpoints()
        return TrainingError(
            f"step {self.step + 1} (epoch {self.epoch}, batch {self.batch}): {what}",
            hint="a lower rate, a longer warmup, or precision='no'; "
            + (f"the last good checkpoint is {kept[-1]}" if kept else "with folder= there would be checkpoints"),
        )

    def _log(self, sums: Mapping[str, float], seen: int, epoch: float, started: float) -> None:
        means = {name: total / seen for name, total in sums.items()}
        rate = float(self.schedule.get_last_lr()[0])
        seconds = self.before + time.perf_counter() - started
        point = Point(self.step, round(epoch, 4), sum(means.values()), means, rate, round(seconds, 3))
        self.curve.append(point)
        if not self.accelerator.is_main_process:
            return
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "curve.jsonl").open("a") as file:
                file.write(json.dumps(asdict(point)) + "\n")
        if self.progress:
            self.progress(point)

    # checkpoints

    def _checkpoints(self) -> list[Path]:
        found = self.folder.glob("step-*") if self.folder else ()
        return sorted((path for path in found if path.suffix != ".tmp"), key=lambda path: int(path.name[5:]))

    def _checkpoint(self, seconds: float) -> None:
        """Write one beside the others, and give it its name when it is whole."""
        assert self.folder is not None
        place = self.folder / f"step-{self.step}"
        temporary = place.with_name(f"{place.name}.tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            about = {"step": self.step, "epoch": self.epoch, "batch": self.batch, "seconds": seconds}
            (temporary / "progress.json").write_text(json.dumps(about))
            shutil.rmtree(place, ignore_errors=True)
            temporary.rename(place)
            for old in self._checkpoints()[:-_KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> Callable[[], None] | None:
        """Load the last checkpoint, if there is one; returns what sets the random numbers to its state."""
        found = self._checkpoints()
        if self.folder is None:
            return None
        curve = self.folder / "curve.jsonl"
        points = [Point(**json.loads(line)) for line in curve.read_text().splitlines()] if curve.exists() else []
        if found:
            self.accelerator.load_state(str(found[-1]))
            about = json.loads((found[-1] / "progress.json").read_text())
            self.step, self.epoch, self.batch = about["step"], about["epoch"], about["batch"]
            self.before = about["seconds"]
        self.curve = [point for point in points if point.step <= self.step]
        if points and self.accelerator.is_main_process:
            curve.write_text("".join(json.dumps(asdict(point)) + "\n" for point in self.curve))
        state = torch.get_rng_state()
        return (lambda: torch.set_rng_state(state)) if found else None

    def _save_weights(self, models: list[Any], weights: list[Any], directory: str) -> None:
        """Only what is trained goes into a checkpoint."""
        if self.accelerator.is_main_process:
            save_file({k: w.detach().contiguous() for k, w in self.weights.items()}, Path(directory) / _WEIGHTS)
        weights.clear()

    def _load_weights(self, models: list[Any], directory: str) -> None:
        stored = load_file(Path(directory) / _WEIGHTS)
        if stored.keys() != self.weights.keys():
            raise SpecError(
                f"the checkpoint in {directory} trains other weights: {sorted(stored.keys() ^ self.weights.keys())[:5]}",
                hint="another folder, or the program and train= of that run",
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(stored[name])
        models.clear()
