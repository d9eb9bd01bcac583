"""Losses of logits and hidden states, over the places that count.

A batch holds ``labels``: int64 class indices for each place of the logits, `IGNORED` where nothing counts.
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
    """Of logits ``[..., classes]`` with ``batch["labels"]``, over the places that count."""
    labels = batch.get("labels")
    if labels is None or labels.shape != logits.shape[:-1]:
        found = "none" if labels is None else list(labels.shape)
        raise SpecError(f"labels of shape {list(logits.shape[:-1])} are needed, the batch has {found}")
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, label_smoothing=smoothing)


def counted(logits: Tensor, batch: Values) -> Tensor:
    """Which places of the logits count, ``bool`` of their shape without the classes."""
    labels = batch.get("labels")
    if labels is None:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return labels != IGNORED


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
