"""Losses of logits and hidden states, over the places that count.

A batch holds ``labels``: class indices for each place of the logits, `IGNORED` where nothing counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import SpecError

IGNORED = -100
Values = Mapping[str, Tensor]


def cross_entropy(logits: Tensor, batch: Values, smoothing: float = 0.0) -> Tensor:
    """Of logits ``[..., classes]`` with ``batch["labels"]``, over the places that count.

    Raises:
        SpecError: there are no labels of that shape, they are no class indices, or no place counts.
    """
    if batch.get("labels") is None:
        raise SpecError(
            f"labels of shape {list(logits.shape[:-1])} are needed, the batch has none, but {sorted(batch)}",
            hint="class indices as 'labels', or SelfDistillation, which needs none",
        )
    classes, labels, counts = logits.shape[-1], batch["labels"], counted(logits, batch)
    if labels.is_floating_point() or labels.is_complex():
        raise SpecError(
            f"labels are {labels.dtype}: class indices are whole numbers", hint="labels.argmax(-1) of logits"
        )
    if bool((wrong := counts & ((labels < 0) | (labels >= classes))).any()):
        raise SpecError(
            f"labels have {labels[wrong].unique()[:5].tolist()}; the logits have {classes} classes, 0 to {classes - 1}",
            hint=f"{IGNORED} where nothing counts",
        )
    flat = logits.reshape(-1, classes)
    return F.cross_entropy(flat, labels.reshape(-1).long(), ignore_index=IGNORED, label_smoothing=smoothing)


def counted(logits: Tensor, batch: Values) -> Tensor:
    """Which places of the logits count, ``bool`` of their shape without the classes.

    Raises:
        SpecError: the labels have another shape, or no place counts.
    """
    labels = batch.get("labels")
    if labels is None:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    found = list(labels.shape) if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
    if found != list(logits.shape[:-1]):
        raise SpecError(
            f"labels of shape {list(logits.shape[:-1])} are needed, the batch has {found}",
            hint="a class index for each place of the logits",
        )
    counts = labels != IGNORED
    if not bool(counts.any()):
        raise SpecError(f"no place counts: all labels are {IGNORED}", hint="leave such batches out")
    return counts


def aligned(students: list[Tensor], teachers: list[Tensor], align: str) -> list[tuple[Tensor, Tensor]]:
    """Which student's hidden state follows which teacher's."""
    if align == "last":
        return [(students[-1], teachers[-1])]
    if align == "unif":
        return list(zip(students, teachers, strict=True))
    pairs, free = [], len(students)
    for teacher in reversed(teachers):
        if not free:
            break
        distances = [F.mse_loss(student.detach(), teacher).item() for student in students[:free]]
        free = min(range(free), key=distances.__getitem__)
        pairs.append((students[free], teacher))
    return pairs


def relative_error(found: Tensor, taught: Tensor) -> Tensor:
    """How far hidden states ``[tokens, features]`` are from a teacher's: squared error over the variance of these."""
    spread = taught - taught.mean(0) if len(taught) > 1 else taught  # one token has no variance
    return F.mse_loss(found, taught) / spread.square().mean().clamp(min=1e-12)
