"""The models of ``vision_acm``: ViT-S taught CIFAR-10, and students of it that do with less.

All students learn alike, from the same images and for as many steps: what the teacher says and the labels, then its
hidden states too.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import offramp
from benchmarks._common import data, say
from offramp import training
from offramp.program import Program
from offramp.training.losses import IGNORED, Values, cross_entropy, relative_error
from offramp.training.objective_module import ObjectiveModule
from offramp.zoo import vit
from offramp.zoo._rebuild import rebuild

RESULTS = Path("benchmarks/results/vision_acm")
SIDE = 112  # pixels: CIFAR-10's 32 made larger
HELD_OUT = 1000  # of the training images: they choose thresholds and widths
DEPTH, FEATURES, HIDDEN = 12, 384, 1536
TOKENS = (SIDE // vit.PATCH_SIZE) ** 2 + 1
LEARNERS = 4
EXITS = (3, 5, 7, 9)
TEACHER_RATE, RATE, BATCH = 3e-5, 6e-5, 64
LEAST, MOST = 0.1, 0.7  # the widths that gates are trained for: from 25% of the blocks' FLOPs, with exits, to 75%
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    epochs: float
    rate: float
    batch: int = BATCH
    seed: int = 0
    images: int | None = None  # None for all

    def fit(
        self, program: Program, objective: training.Objective, teacher: Program | None = None, **options: Any
    ) -> None:
        """Train all weights of the program."""
        images, labels = cifar("train", self.device)
        says = speaking(teacher, self.device) if teacher else None
        batches = Images(images[: self.images], labels[: self.images], self.batch, self.seed, says)
        steps = max(1, round(self.epochs * len(batches)))
        # on a CPU the plain attention of 65 tokens is the quicker one: a fifth of a step's time
        with sdpa_kernel(SDPBackend.MATH) if self.device == "cpu" else contextlib.nullcontext():
            training.fit(
                program,
                batches,
                objective,
                steps=steps,
                train=options.pop("train", "all"),
                rate=self.rate,
                warmup=steps // 10,
                optimizer=lambda weights: torch.optim.AdamW(weights, self.rate, weight_decay=0.05),
                precision="auto",
                progress=lambda at: say(
                    f"epoch {at.epoch:.1f}: {', '.join(f'{k} {v:.3f}' for k, v in at.losses.items())}"
                ),
                log_every=max(1, len(batches) // 4),
                seed=self.seed,
                **options,
            )

    @property
    def device(self) -> str:
        """Where accelerate puts the model."""
        return "cpu" if os.environ.get("ACCELERATE_USE_CPU") or not torch.cuda.is_available() else "cuda"


def cifar(part: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images ``[N, 32, 32, 3]`` uint8 and labels of "train", "held out" or "test"."""
    stored = np.load(data(f"cifar10_{'test' if part == 'test' else 'train'}.npz"))
    images, labels = (torch.from_numpy(stored[name]).to(device) for name in ("images", "labels"))
    places = {"train": slice(None, -HELD_OUT), "held out": slice(-HELD_OUT, None), "test": slice(None)}[part]
    return images[places], labels[places]


def pixels(images: Tensor) -> Tensor:
    """What the model reads of images: ``[N, 3, SIDE, SIDE]`` float32."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (_MEAN, _STD))
    scaled = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
    return F.interpolate(scaled, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


@dataclass
class Images:
    """Batches of moved and mirrored images, others at each epoch, with what a teacher makes of them.

    With a teacher every second image is mixed with another; it has no label then.
    """

    images: Tensor
    labels: Tensor
    batch: int
    seed: int
    teacher: Callable[[Tensor], dict[str, Tensor]] | None
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        device = self.images.device
        random = torch.Generator(device).manual_seed(self.seed * 10_000 + self.epoch)
        order = torch.randperm(len(self.images), generator=random, device=device)
        for chosen in order.split(self.batch)[: len(self)]:
            given, labels = pixels(_moved(self.images[chosen], random)), self.labels[chosen].clone()
            if self.teacher is None:
                yield {"pixel_values": given, "labels": labels}
                continue
            share = torch.rand(len(given), 1, 1, 1, generator=random, device=device)
            share[::2] = 1
            given = share * given + (1 - share) * given.roll(1, 0)
            labels[1::2] = IGNORED
            yield {"pixel_values": given, "labels": labels, **self.teacher(given)}


def _moved(images: Tensor, random: torch.Generator, most: int = 4) -> Tensor:
    """Images shifted by up to ``most`` pixels either way, and half of them mirrored."""
    count, side, device = len(images), images.shape[1], images.device
    padded = F.pad(images.permute(0, 3, 1, 2).float(), [most] * 4, mode="reflect").permute(0, 2, 3, 1)
    down, right = torch.randint(2 * most + 1, (2, count, 1), generator=random, device=device)
    rows, columns = torch.arange(side, device=device) + down, torch.arange(side, device=device) + right
    mirrored = torch.rand(count, 1, generator=random, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def speaking(teacher: Program, device: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """What the teacher makes of pixels: its logits, "teacher", and its hidden states after blocks, `state`."""
    model = ObjectiveModule(copy.deepcopy(teacher), training.Objective()).to(device).eval()
    cuts = teacher.stacks["encoder"].cuts
    names = {"logits": "teacher", **{cuts[after]: state(after) for after in (*EXITS, DEPTH)}}

    def made(given: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, training.computes_bf16(device)):
            values = model.values(names, {"pixel_values": given})
        return {names[name]: value.float() for name, value in values.items()}

    return made


def state(after: int) -> str:
    """Under what name a batch has the teacher's hidden states after so many blocks."""
    return f"teacher's state {after}"


@dataclass(frozen=True)
class Distilled(training.Objective):
    """At full depth and each exit alike: cross-entropy with the labels, and ``KL(teacher || student)``.

    To that come ``states`` times how far the hidden states that they are made of are from the teacher's, squared, over
    the variance of these. A student with fewer blocks has none that stand for the teacher's.
    """

    states: float = 0.0

    def _outputs(self, program: Program) -> list[str]:
        return ["logits", *(item.outputs["logits"] for item in program.exits)]

    def _followed(self, program: Program) -> dict[str, int]:
        """Nodes of hidden states, and after how many blocks they lie."""
        cuts = program.stacks["encoder"].cuts
        if not self.states or len(cuts) <= DEPTH:
            return {}
        return {cuts[after]: after for after in (*(item.after for item in program.exits), DEPTH)}

    def wants(self, program: Program, step: int) -> Sequence[str]:
        return [*self._outputs(program), *self._followed(program)]

    def losses(self, program: Program, values: Values, batch: Values) -> dict[str, Tensor]:
        said = F.log_softmax(batch["teacher"], -1)
        outputs, followed = self._outputs(program), self._followed(program)
        found = {}
        for name in outputs:
            logits = values[name].float()
            loss = F.kl_div(F.log_softmax(logits, -1), said, reduction="batchmean", log_target=True)
            found[name] = (loss + 0.5 * cross_entropy(logits, batch)) / len(outputs)
        for name, after in followed.items():
            apart = relative_error(values[name].float().flatten(0, 1), batch[state(after)].flatten(0, 1))
            found[state(after)] = self.states * apart / len(followed)
        return found


def distil(program: Program, teacher: Program, recipe: Recipe) -> None:
    """Train a student: from what the teacher says, and half as long again from its hidden states too.

    One with learners learns for all widths, after its learners and gates.
    """
    then = replace(recipe, epochs=recipe.epochs / 2, seed=recipe.seed + 1)
    first = _learners(program, teacher, recipe) if program.learners else recipe
    for part, task in ((first, Distilled()), (then, Distilled(states=3.0))):
        for_widths = training.WidthBudget(task=task, low=LEAST, high=MOST, budget=1.0)
        part.fit(program, for_widths if program.learners else task, teacher)


def _learners(program: Program, teacher: Program, recipe: Recipe) -> Recipe:
    """Train the learners first, the gates then; what is left of the recipe."""
    first, second = recipe.epochs / 10, recipe.epochs / 15
    learners, gates = replace(recipe, epochs=first, rate=3e-4), replace(recipe, epochs=second, rate=3e-3)
    learners.fit(program, training.LearnerDistillation(teacher), train="added")
    gates.fit(program, training.GateDistillation(teacher, low=LEAST, high=MOST, draws=2), train="added")
    return replace(recipe, epochs=recipe.epochs - first - second)


def untrained() -> nn.Module:
    """ViT-S for SIDE pixels, with a new head that reads the class token and the patches' mean."""
    from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

    state = vit.backbone_weights(vit.WEIGHTS.file("models/vit_s_focus.onnx"))
    places, fine, coarse = (
        state["embeddings.position_embeddings"],
        vit.IMAGE_SIZE // vit.PATCH_SIZE,
        SIDE // vit.PATCH_SIZE,
    )
    square = places[:, 1:].reshape(1, fine, fine, FEATURES).permute(0, 3, 1, 2)
    patches = F.interpolate(square, size=(coarse, coarse), mode="bicubic", antialias=True, align_corners=False)
    state["embeddings.position_embeddings"] = torch.cat((places[:, :1], patches.flatten(2).transpose(1, 2)), 1)
    config = Dinov2Config(
        hidden_size=FEATURES,
        num_hidden_layers=DEPTH,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=vit.PATCH_SIZE,
        use_mask_token=False,
        num_labels=10,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = Dinov2ForImageClassification(config)
    model.dinov2 = rebuild(Dinov2Model, config, state)
    return model.eval()


def example() -> Tensor:
    """Some training images: what ``insert-acm`` orders hidden units by."""
    return pixels(cifar("train")[0][:32])


def captured(model: nn.Module, passes: str = "") -> Program:
    """The model as a program, rewritten."""
    program = offramp.capture(model, {"pixel_values": example()})
    return offramp.apply(program, passes) if passes else program


def narrowed(model: nn.Module, width: float) -> nn.Module:
    """The model with that share of each MLP's hidden units: the most important ones, as ``insert-acm`` orders them."""
    model, seen = copy.deepcopy(model), list[Tensor]()
    hooks = [mlp.fc2.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for mlp in _mlps(model)]
    with torch.no_grad():
        model(example())
    for mlp, hidden, hook in zip(_mlps(model), seen, hooks, strict=True):
        hook.remove()
        importance = hidden.square().mean((0, 1)) * mlp.fc2.weight.square().sum(0)
        kept = importance.argsort(descending=True, stable=True)[: round(width * HIDDEN)]
        up, down = nn.Linear(FEATURES, len(kept)), nn.Linear(len(kept), FEATURES)
        with torch.no_grad():
            up.weight.copy_(mlp.fc1.weight[kept])
            up.bias.copy_(mlp.fc1.bias[kept])
            down.weight.copy_(mlp.fc2.weight[:, kept])
            down.bias.copy_(mlp.fc2.bias)
        mlp.fc1, mlp.fc2 = up, down
    return model


def factored(model: nn.Module, width: float) -> nn.Module:
    """The model with each matrix of its MLPs as two, by singular values, that cost that share of it together."""
    model = copy.deepcopy(model)
    rank = round(width * FEATURES * HIDDEN / (FEATURES + HIDDEN))
    for mlp in _mlps(model):
        for name in ("fc1", "fc2"):
            whole = getattr(mlp, name)
            left, values, right = torch.linalg.svd(whole.weight.detach(), full_matrices=False)
            first, second = nn.Linear(whole.in_features, rank, bias=False), nn.Linear(rank, whole.out_features)
            root = values[:rank].sqrt()
            with torch.no_grad():
                first.weight.copy_(root[:, None] * right[:rank])
                second.weight.copy_(left[:, :rank] * root)
                second.bias.copy_(whole.bias)
            setattr(mlp, name, nn.Sequential(first, second))
    return model


def _mlps(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "Dinov2MLP"]


def share(width: float, gates: bool = False) -> float:
    """The share of the blocks' FLOPs that is left with so much of the MLPs' hidden units."""
    other = 4 * FEATURES**2 + 2 * TOKENS * FEATURES
    gate = FEATURES * 16 + 16 * (LEARNERS + 1) if gates else 0
    return (other + gate + width * 2 * FEATURES * HIDDEN) / (other + 2 * FEATURES * HIDDEN)


def width_of(wanted: float, gates: bool = False) -> float:
    """The width whose `share` that is; negative where there is none."""
    return (wanted - share(0, gates)) / (share(1) - share(0))
