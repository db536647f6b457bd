"""Using classifiers of images on image files.

Shapes: B batch, C channels, H, W image height and width, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from paradepth.data.images import read_image
from paradepth.predict.model import Model


@torch.no_grad()
def predict_images(
    model: Model, images: Sequence[str | Path], *, branches: int | None = None, top: int = 1
) -> list[dict[str, Any]]:
    """Classifies image files.

    Args:
        model: an image classifier in evaluation mode.
        images: paths; each is converted to the model's channels and size.
        branches: use the first branches only.
        top: number of classes named for each image.

    Returns:
        For each image its path and `top` classes with their confidence, the likeliest first.

    Raises:
        ValueError: another kind of model, no images, a file that is missing or no image, or `branches` or `top` out of
            range.
    """
    if model.model_type != "image_classifier":
        raise ValueError(
            f"predict classifies images, and this is a model of type {model.model_type!r}; it cannot be asked for text "
            "yet, but `paradepth evaluate` measures it"
        )
    if not images:
        raise ValueError("predict needs at least one image file")
    c = model.config
    if not 1 <= top <= c.num_classes:
        raise ValueError(f"top is {top}; it must be between 1 and {c.num_classes}, the number of classes")
    results = []
    names = c.class_names or tuple(str(i) for i in range(c.num_classes))
    for path in images:
        image_CHW = read_image(path, channels=c.channels, image_size=c.image_size)
        images_1CHW = image_CHW.unsqueeze(0).to(model.device).float() / 255
        p_N = model(images_1CHW, branches=branches).softmax(dim=-1)[0]
        best = p_N.topk(top)
        classes = [
            {"class": names[i], "confidence": p}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        results.append({"image": str(path), "classes": classes})
    return results
