"""Loss and accuracy of every prefix, contributions of branches, confusion matrix and example predictions.

Shapes: B batch, C channels, H, W image size, N classes, n prefixes.
"""

from __future__ import annotations

import base64
import io
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from paradepth.data.images import ImageSplit
from paradepth.distributed import World
from paradepth.models import ImageClassifier


@dataclass(frozen=True)
class Evaluation:
    """Means over a split: `loss` and `accuracy` of each prefix, `contribution` ‖δ_i‖/‖x‖ of each branch."""

    loss: list[float]
    accuracy: list[float]
    contribution: list[float]


@torch.no_grad()
def evaluate(
    model: ImageClassifier,
    split: ImageSplit,
    *,
    world: World,
    batch_size: int = 500,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Evaluates every prefix of `model` on a split, shared among the processes of `world`.

    Returns the same numbers on every process; the model's training mode is left as it was.
    """
    was_training = model.training
    model.eval()
    branches = model.prefixes if model.config.branches else 0
    sums = torch.zeros(2 * model.prefixes + branches, dtype=torch.float64, device=world.device)
    starts = list(range(0, len(split), batch_size))
    for start in starts[world.rank :: world.size]:
        images_BCHW = split.images_NCHW[start : start + batch_size].float() / 255
        labels_B = split.labels_N[start : start + batch_size]
        with torch.autocast(world.device.type, dtype=autocast) if autocast else nullcontext():
            logits_nBN = model.prefix_logits(images_BCHW).float()
        losses_n = torch.stack([F.cross_entropy(logits_BN, labels_B, reduction="sum") for logits_BN in logits_nBN])
        correct_n = (logits_nBN.argmax(dim=-1) == labels_B).sum(dim=1)
        sums[: model.prefixes] += losses_n
        sums[model.prefixes : 2 * model.prefixes] += correct_n
        if branches and start == 0:  # one batch tells the contributions well enough
            sums[2 * model.prefixes :] += model.contributions(images_BCHW).double().mean(dim=1)
    model.train(was_training)
    values = world.sum(sums).tolist()
    n = model.prefixes
    return Evaluation(
        [v / len(split) for v in values[:n]], [v / len(split) for v in values[n : 2 * n]], values[2 * n :]
    )


@torch.no_grad()
def detailed_evaluation(
    model: ImageClassifier,
    split: ImageSplit,
    *,
    name: str,
    class_names: tuple[str, ...],
    examples: int = 24,
    batch_size: int = 500,
) -> dict[str, Any]:
    """What `evaluation.json` holds: means by prefix, confusion matrix of the full model, and example predictions.

    Examples are the first samples of the split: as many mistakes as there are, up to half, the rest right.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # slow to import

    was_training = model.training
    model.eval()
    log_p_nBN = torch.cat(
        [
            model.prefix_logits(split.images_NCHW[i : i + batch_size].float() / 255).double().log_softmax(dim=-1)
            for i in range(0, len(split), batch_size)
        ],
        dim=1,
    )
    contribution_nB = model.contributions(split.images_NCHW[:batch_size].float() / 255)
    model.train(was_training)
    labels_nB1 = split.labels_N.expand(len(log_p_nBN), -1).unsqueeze(-1)
    loss_n = -log_p_nBN.gather(2, labels_nB1).squeeze(-1).mean(dim=1)
    predicted_nB = log_p_nBN.argmax(dim=-1)
    right_nB = predicted_nB == split.labels_N
    confusion = multiclass_confusion_matrix(predicted_nB[-1], split.labels_N, num_classes=model.config.num_classes)
    wrong = (~right_nB[-1]).nonzero().flatten().tolist()[: examples // 2]
    right = right_nB[-1].nonzero().flatten().tolist()[: examples - len(wrong)]
    return {
        "split": name,
        "samples": len(split),
        "loss": loss_n.tolist(),
        "accuracy": right_nB.double().mean(dim=1).tolist(),
        "contribution": contribution_nB.double().mean(dim=1).tolist(),
        "confusion": confusion.tolist(),
        "class_names": list(class_names),
        "examples": [
            {
                "png": _png(split.images_NCHW[i]),
                "label": int(split.labels_N[i]),
                "prediction": int(predicted_nB[-1, i]),
                "confidence": float(log_p_nBN[-1, i].max().exp()),
                "by_prefix": predicted_nB[:, i].tolist(),
            }
            for i in wrong + right
        ],
    }


def _png(image_CHW: Tensor) -> str:
    array = image_CHW.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3]))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
