"""``fit``: the training loop. Devices, precision, accumulation and processes are accelerate's business."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from offramp.errors import SpecError, TrainingError
from offramp.program.program import Program
from offramp.training.checkpoints import Checkpoints
from offramp.training.objective_module import Batch, ObjectiveModule
from offramp.training.objectives import Objective
from offramp.training.weights import added

_CURVE = "curve.jsonl"


@dataclass(frozen=True)
class CurvePoint:
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
    progress: Callable[[CurvePoint], None] | None = None,
    log_every: int = 50,
    seed: int = 0,
) -> tuple[CurvePoint, ...]:
    """Train a rewritten program in place; the captured model shares its weights.

    Args:
        program: what to train; capture it with ``training=True`` if its dropout is to stay.
        batches: mappings from names to tensors: the program's inputs, and what the objective reads (``labels``). It is
            gone through once an epoch, after ``set_epoch(epoch)`` if it has that; torch's random numbers start anew
            with each epoch. Several processes take turns: each gets its share of the batches.
        objective: what is minimised; see ``offramp.training.objectives``.
        epochs: how often to go through the batches.
        steps: stop after so many steps of the optimizer, whatever ``epochs`` says; needed where batches have no length.
        train: "added" trains only what passes have added, and no bit of the model; "all" trains everything.
        rate: the greatest learning rate; it falls to zero along a cosine.
        warmup: steps in which the learning rate rises to it.
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
    AcceleratorState._reset_state()  # of an earlier run, which may have had another precision
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        step_scheduler_with_optimizer=False,
    )
    length = len(batches) // accelerator.num_processes if isinstance(batches, Sized) else 0
    total = _total(length, epochs, steps, accumulate)
    model = ObjectiveModule(program, objective, apart=train == "all")
    asked = [(weight, weight.requires_grad) for weight in model.parameters()]
    weights = _chosen(program, model, train)
    home = next(model.parameters()).device
    made = optimizer(list(weights.values())) if optimizer else torch.optim.AdamW(weights.values(), rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: _schedule(step, warmup, total))
    module, stepper, paced = accelerator.prepare(model, made, schedule)
    checkpoints = Checkpoints(Path(folder), accelerator, weights, type(objective).__name__) if folder else None
    run = _Run(accelerator, module, stepper, paced, weights, checkpoints, every, log_every, progress, clip, length)
    model.train(train == "all")
    try:
        run.through(batches, total, seed)
    finally:
        model.eval()
        for weight, wanted in asked:
            weight.requires_grad_(wanted)
        accelerator.free_memory()
        model.to(home)
    return tuple(run.curve)


def _total(length: int, epochs: int, steps: int | None, accumulate: int) -> int:
    """How many steps of the optimizer there will be; ``length`` is that of an epoch, 0 where it is not known."""
    if steps is None and not length:
        raise SpecError("there are no batches, or they have no length", hint="say how many steps=")
    return epochs * length // accumulate if steps is None else steps


def _schedule(step: int, warmup: int, total: int) -> float:
    """The share of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _chosen(program: Program, model: ObjectiveModule, train: str) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained; no other gets a gradient."""
    if train not in ("added", "all"):
        raise SpecError(f"train={train!r}: there are added and all")
    every = dict(model.module.named_parameters())
    chosen = added(program) if train == "added" else every
    if not chosen:
        raise SpecError(
            "the passes have added no weights to train",
            hint="insert-adapter, insert-scores{measure=learned} or insert-exits{head=own}; or train='all'",
        )
    model.requires_grad_(False)
    for name in chosen:
        every[name].requires_grad_(True)
    return chosen


class _Run:
    """The state of a training run, and its checkpoints."""

    def __init__(
        self,
        accelerator: Accelerator,
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
        self.accelerator, self.model, self.optimizer, self.schedule = accelerator, model, optimizer, schedule
        self.weights, self.checkpoints, self.every, self.log_every = weights, checkpoints, every, log_every
        self.progress, self.clip, self.length = progress, clip, length
        self.step = self.epoch = self.batch = 0
        self.before = 0.0  # seconds of earlier runs
        self.curve: list[CurvePoint] = []

    def through(self, batches: Iterable[Batch], total: int, seed: int) -> None:
        """Train to the end, from the last checkpoint on."""
        restore, resumed = self._resume(), True
        started, sums, seen = time.perf_counter(), dict[str, float](), 0
        while self.step < total:
            torch.manual_seed(seed + self.epoch)
            skip = self.batch
            for batch in self._mine(batches, skip):
                if resumed:
                    restore()
                    resumed = False
                losses = self._one(batch)
                self.batch += 1
                seen += 1
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value
                if not self.accelerator.sync_gradients:
                    continue
                self.step += 1
                if self.step % self.log_every == 0 or self.step == total:
                    self._log(sums, seen, self.epoch + self.batch / max(1, self.length), started)
                    sums, seen = {}, 0
                if self.checkpoints and (self.step % self.every == 0 or self.step == total):
                    where = {"step": self.step, "epoch": self.epoch, "batch": self.batch}
                    seconds = self.before + time.perf_counter() - started
                    self.checkpoints.save(self.step, {**where, "seconds": seconds})
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
        given = islice(iter(batches), skip * count, None)
        while len(shares := list(islice(given, count))) == count:  # every process has one, or none has
            yield {name: value.to(self.accelerator.device) for name, value in shares[rank].items()}

    def _one(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, and a step where enough batches have been accumulated."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            losses: dict[str, Tensor] = self.model(batch, self.step)
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
        kept = self.checkpoints.found() if self.checkpoints else []
        return TrainingError(
            f"step {self.step + 1} (epoch {self.epoch}, batch {self.batch}): {what}",
            hint="a lower rate, a longer warmup, or precision='no'; "
            + (f"the last good checkpoint is {kept[-1]}" if kept else "with folder= there would be checkpoints"),
        )

    def _log(self, sums: Mapping[str, float], seen: int, epoch: float, started: float) -> None:
        means = {name: total / seen for name, total in sums.items()}
        rate = float(self.schedule.get_last_lr()[0])
        seconds = self.before + time.perf_counter() - started
        point = CurvePoint(self.step, round(epoch, 4), sum(means.values()), means, rate, round(seconds, 3))
        self.curve.append(point)
        if not self.accelerator.is_main_process:
            return
        if self.checkpoints:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            with (self.checkpoints.folder / _CURVE).open("a") as file:
                file.write(json.dumps(asdict(point)) + "\n")
        if self.progress:
            self.progress(point)

    def _resume(self) -> Callable[[], None]:
        """Go on from the last checkpoint, if there is one; returns what sets the random numbers to its state."""
        if self.checkpoints is None:
            return lambda: None
        about = self.checkpoints.load()
        if about is not None:
            self.step, self.epoch, self.batch = about["step"], about["epoch"], about["batch"]
            self.before = about["seconds"]
        file = self.checkpoints.folder / _CURVE
        points = [CurvePoint(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
        self.curve = [point for point in points if point.step <= self.step]
        if points and self.accelerator.is_main_process:
            file.write_text("".join(json.dumps(asdict(point)) + "\n" for point in self.curve))
        state = torch.get_rng_state()
        return lambda: torch.set_rng_state(state) if about is not None else None
