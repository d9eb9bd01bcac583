"""``fit``: the training loop. Devices, precision, accumulation and processes are accelerate's business."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from offramp.errors import SpecError
from offramp.program.program import Program, as_program
from offramp.training.batches import Batches, length_of, require_batches
from offramp.training.checkpoints import Checkpoints
from offramp.training.fit_options import check_options, computes_bf16
from offramp.training.objective_module import ObjectiveModule
from offramp.training.objectives import Objective, require_objective
from offramp.training.training_run import CurvePoint, TrainingRun
from offramp.training.weights import trained

log = logging.getLogger(__name__)


def fit(
    program: Program,
    batches: Batches,
    objective: Objective,
    *,
    epochs: float = 1,
    steps: int | None = None,
    train: Literal["added", "all"] = "added",
    rate: float = 1e-3,
    warmup: int = 0,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
    clip: float = 1.0,
    precision: Literal["no", "auto", "bf16", "fp16"] = "no",
    accumulate: int = 1,
    folder: str | os.PathLike[str] | None = None,
    every: int = 500,
    progress: Callable[[CurvePoint], None] | None = None,
    log_every: int = 50,
    seed: int = 0,
) -> tuple[CurvePoint, ...]:
    """Train a rewritten program in place; the captured model shares its weights.

    Args:
        program: what to train, of ``capture`` and ``apply``; capture it with ``training=True`` if its dropout is to
            stay.
        batches: a list, a ``DataLoader``, or anything else that can be gone through once an epoch, or a function
            without parameters that makes it (what a generator makes can be gone through once only). Each batch is a
            mapping from names to tensors, arrays or lists of numbers, on any device: the program's inputs, in sizes
            and dtypes that it takes, and what the objective reads (``labels``: class indices, for each place of the
            logits that of *its own* answer; so those of a language model are its ids, shifted to the left). What
            neither reads is ignored: where rows are padded, capture the model with its ``attention_mask``.
            ``set_epoch(epoch)`` is called before each epoch if there is that; torch's random numbers start anew with
            each epoch. Several processes take turns: each gets its share of the batches.
        objective: what is minimised, an instance; see ``offramp.training.objectives``.
        epochs: how often to go through the batches; may be a fraction.
        steps: stop after so many steps of the optimizer, whatever ``epochs`` says; needed where batches have no length.
        train: "added" trains only what passes have added, and no bit of the model, to which learners belong where the
            objective is none of adaptive width; "all" trains everything that is not
            frozen (``requires_grad=False``): of a model with LoRA what that has added, say, beside what passes have.
        rate: the greatest learning rate; it falls to zero along a cosine. With ``optimizer`` its own counts.
        warmup: steps in which the learning rate rises to it.
        optimizer: a function that makes one of the list of weights that are trained; None for AdamW without weight
            decay.
        clip: the greatest norm of the gradient; ``math.inf`` for no limit.
        precision: accelerate's mixed precision; "auto" is "bf16" where the device gains by it (`computes_bf16`), else
            "no". Weights stay in the dtype that they have.
        accumulate: batches a step.
        folder: where checkpoints and ``curve.jsonl`` go. A run that finds a checkpoint there goes on from it, with the
            curve that it would have had in one go.
        every: steps between checkpoints.
        progress: called with each point, by the main process.
        log_every: steps between points.
        seed: of torch's random numbers.

    Returns:
        The curve, earlier runs of the same folder included.

    Raises:
        SpecError: options make no sense, or the program, the batches and the objective do not fit: a batch lacks an
            input, say, or the program does not run on it, or nothing that is trained changes the loss.
        TrainingError: a loss or a gradient is not finite; the last checkpoint is kept.
    """
    as_program(program)
    require_objective(objective)
    require_batches(batches)
    check_options(
        train=train, precision=precision, epochs=epochs, rate=rate, clip=clip, seed=seed, optimizer=optimizer,
        folder=folder, steps=steps, warmup=warmup, accumulate=accumulate, every=every, log_every=log_every,
    )  # fmt: skip
    if program.cache is not None:
        raise SpecError("the program has caches, which training does not need", hint="train first, insert-cache then")
    objective.check(program)
    accelerator = _accelerator(precision, int(accumulate))
    length = length_of(batches) // accelerator.num_processes
    total = _total(length, epochs, steps, accumulate)
    with torch.inference_mode(False):
        model = ObjectiveModule(program, objective, apart=train == "all")
    asked = [(weight, weight.requires_grad) for weight in model.parameters()]
    home = next(model.parameters()).device
    try:
        weights = _chosen(program, model, objective, train)
        made = _optimizer(optimizer, list(weights.values()), rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: _schedule(step, warmup, total))
        checkpoints = Checkpoints(Path(folder), accelerator, weights, type(objective).__name__) if folder else None
        module, stepper, paced = accelerator.prepare(model, made, schedule)
        run = TrainingRun(
            accelerator, model, module, stepper, paced, weights, checkpoints, every, log_every, progress, clip, length
        )
        model.train(train == "all")
        with torch.inference_mode(False), torch.enable_grad():  # wherever this is called
            run.through(batches, total, seed)
    finally:
        model.eval()
        for weight, wanted in asked:
            weight.requires_grad_(wanted)
        accelerator.free_memory()
        model.to(home)
    return tuple(run.curve)


def _accelerator(precision: str, accumulate: int) -> Accelerator:
    if precision in ("auto", "bf16"):
        AcceleratorState._reset_state()
        device = Accelerator(mixed_precision="no").device
        if precision == "auto":
            precision = "bf16" if computes_bf16(device) else "no"
        elif not computes_bf16(device):
            log.warning('precision="bf16": %s is slower in it than in fp32; precision="auto" asks first', device)
    AcceleratorState._reset_state()  # of an earlier run, which may have had another precision
    try:
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:  # what this machine does not have
        raise SpecError(f"precision={precision!r}: {error}", hint='precision="bf16" or "no"') from error


def _optimizer(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None,
    weights: list[torch.nn.Parameter],
    rate: float,
) -> torch.optim.Optimizer:
    made = make(weights) if make else torch.optim.AdamW(weights, rate, weight_decay=0)
    if not isinstance(made, torch.optim.Optimizer):
        raise SpecError(f"optimizer= made a {type(made).__name__}; a torch.optim.Optimizer is needed")
    return made


def _total(length: int, epochs: float, steps: int | None, accumulate: int) -> int:
    """How many steps of the optimizer there will be; ``length`` is that of an epoch, 0 where it is not known."""
    if steps is not None:
        return int(steps)
    if not length:
        raise SpecError("there are no batches, or they have no length", hint="say how many steps=")
    total = int(epochs * length // accumulate)
    if not total:
        raise SpecError(
            f"epochs={epochs} of {length} batches, accumulate={accumulate}: not one step", hint="a smaller accumulate="
        )
    return total


def _schedule(step: int, warmup: int, total: int) -> float:
    """The share of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _chosen(
    program: Program, model: ObjectiveModule, objective: Objective, train: str
) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained; no other gets a gradient."""
    every = dict(model.module.named_parameters())
    chosen = {name: one for name, one in every.items() if one.requires_grad}
    if train == "added":
        chosen = trained(program, objective.learners)
    if not chosen and train == "all":
        raise SpecError("all weights are frozen (requires_grad=False)", hint="program.module.requires_grad_(True)")
    if not chosen and program.learners:
        raise SpecError(
            f"the passes have added nothing but learners, which {type(objective).__name__} leaves as they are",
            hint="WidthBudget(objective) trains them; or train='all'",
        )
    if not chosen:
        raise SpecError(
            "the passes have added no weights to train",
            hint="insert-adapter, insert-scores{measure=learned} or insert-exits{head=own}; or train='all'",
        )
    model.requires_grad_(False)
    for name in chosen:
        every[name].requires_grad_(True)
    return chosen
