"""Using a finished run: measuring it and classifying images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from paradepth.data.images import read_image
from paradepth.distributed import join_world
from paradepth.models import ImageClassifier, TrunkModel, from_pretrained
from paradepth.train.evaluate import evaluate
from paradepth.train.run import read_run_config
from paradepth.train.tasks import load_data


def evaluate_run(
    run_dir: str | Path,
    *,
    split: Literal["test", "validation", "mismatched"] = "test",
    branches: int | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Loss and accuracy of a finished run on a split of its data, and what else its task measures.

    Args:
        run_dir: the run.
        split: "test" or "validation"; "mismatched" is the second test split of MNLI.
        branches: use the first branches only; the list of accuracies then ends with that prefix.
        data_dir: where the data lies now; None takes the place that was used in training.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: not a finished run, a split that the data do not have, more branches than it has, or no data.
    """
    config = read_run_config(run_dir)
    model: TrunkModel = from_pretrained(run_dir)
    if branches is not None:
        model = model.truncate(branches)
    if data_dir is not None:
        config = config.replace(data_dir=data_dir)
    with join_world(device) as world:
        task = load_data(config, assets=Path(run_dir)).to(world.device)
        if split not in task.splits:
            raise ValueError(f"data {task.data.name!r} has no split {split!r}; it has {', '.join(task.splits)}")
        result = evaluate(model.to(world.device), task, split, world=world)
        outputs = task.outputs(model, split)
    return {
        "run": str(run_dir),
        "split": split,
        "branches": model.config.branches,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": result.accuracy,
        "loss": result.loss,
        **task.measures(result.loss, split),
        **result.scores,
        **outputs,
    }


@torch.no_grad()
def predict_images(
    model: TrunkModel, images: Sequence[str | Path], *, branches: int | None = None, top: int = 1
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
    if not isinstance(model, ImageClassifier):
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
        p_N = model(image_CHW.unsqueeze(0).float() / 255, branches=branches).softmax(dim=-1)[0]
        best = p_N.topk(top)
        classes = [
            {"class": names[i], "confidence": p}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        results.append({"image": str(path), "classes": classes})
    return results
