"""Run directories with plausible numbers, for tests that need no training."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def png(seed: int, size: int = 28) -> str:
    """A small grey image as base64 PNG."""
    rng, image = random.Random(seed), Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = rng.randrange(size // 2), rng.randrange(size // 2)
        draw.ellipse(
            (x, y, x + rng.randrange(5, size // 2), y + rng.randrange(5, size // 2)), fill=rng.randrange(90, 255)
        )
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def make_run(
    path: Path,
    *,
    branches: int = 4,
    depth: int = 2,
    schedule: str = "stagewise",
    seed: int = 0,
    compute: float = 5.2e8,
    classes: list[str] | None = None,
    progress: float = 1.0,
    evaluated: bool = True,
    top: float = 0.885,
    **training: Any,
) -> Path:
    """Write a run directory of `branches` × `depth` (0 branches: serial) that got through `progress` of its budget."""
    names = classes or CLASSES
    rng = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    prefixes = max(branches, 1)
    layers = prefixes * depth
    per_branch = 50_048 * depth
    by_prefix = [4_234 + per_branch * (k + 1) for k in range(prefixes)]
    write_json(
        path / "config.json",
        {
            "paradepth": "0.1.0",
            "model_type": "image_classifier",
            "model": {
                "image_size": [28, 28], "patch_size": [7, 7], "channels": 1, "num_classes": len(names), "width": 64,
                "heads": 2, "mlp": 256, "branches": branches, "depth": depth, "aggregate": "residual", "pool": "mean",
                "class_names": names,
            },
            "training": {
                "recipe": "fashion_paraformer", "data": "fashion_mnist", "schedule": schedule, "optimizer": "adamw",
                "learning_rate": 1e-3, "batch_size": 256, "seed": seed, "data_dir": None, **training,
            },
        },
    )  # fmt: skip
    write_json(
        path / "environment.json",
        {
            "paradepth": "0.1.0", "python": "3.11.9", "torch": "2.13.0+cpu", "platform": "Linux-6.1-x86_64",
            "cpu": "AMD EPYC 7B13", "cores": 2, "threads": 1, "device": "cpu", "precision": "float32", "world_size": 1,
            "command": f"paradepth train fashion_paraformer --schedule {schedule} --seed {seed}",
            "started": "2025-11-21T09:00:00+00:00",
        },
    )  # fmt: skip
    events: list[dict[str, Any]] = [
        {
            "event": "start", "parameters": by_prefix[-1], "parameters_by_prefix": by_prefix,
            "forward_flops": [1_700_000 * depth * (k + 1) for k in range(prefixes)], "layers": layers,
            "budget": {"unit": "layer_evals", "value": compute}, "train_samples": 54_000, "validation_samples": 6_000,
            "test_samples": 10_000,
        }
    ]  # fmt: skip
    staged = schedule == "stagewise" and branches > 1
    active = 1 if staged else prefixes
    events.append({"event": "stage", "step": 0, "layer_evals": 0, "seconds": 0.0, "active": active, "reason": "start"})
    steps, accuracy, contribution = 120, [0.1] * prefixes, [0.0] * branches
    for index in range(1, int(steps * progress) + 1):
        spent = compute * index / steps
        common = {
            "step": index * 20, "epoch": index / 8, "layer_evals": spent, "flops": spent * 5.1e6,
            "seconds": spent / 4.0e5, "active": active,
        }  # fmt: skip
        reached = top * (1 - math.exp(-9 * (index / steps) ** 0.6))
        accuracy = []
        for k in range(prefixes):
            lag = 0.05 * (1 - (k + 1) / prefixes) * (1 - 0.6 * index / steps)
            accuracy.append(max(0.1, min(1.0, reached - lag + rng.gauss(0, 0.003))))
        if staged:
            accuracy[active:] = [accuracy[active - 1]] * (prefixes - active)
        loss = [2.3 * (1 - value) + 0.05 for value in accuracy]
        events.append(
            {
                "event": "train", **common, "loss": loss[-1] + rng.gauss(0.02, 0.03),
                "accuracy": min(1.0, accuracy[-1] + rng.gauss(0, 0.012)), "learning_rate": 1e-3 * (1 - index / steps),
                "samples_per_second": 5200 / active, "gradient_norm": 0.8,
            }
        )  # fmt: skip
        if index % 6 == 0:
            contribution = [
                (0.9 if k == 0 else 0.4 / k) * (1 - math.exp(-4 * index / steps)) if k < active else 0.0
                for k in range(branches)
            ]
            events.append(
                {
                    "event": "validation",
                    **common,
                    "loss": loss,
                    "accuracy": accuracy,
                    "contribution": contribution,
                    "ema": False,
                }
            )
        if staged and index % (steps // prefixes) == 0 and active < prefixes:
            active += 1
            changed = {key: common[key] for key in ("step", "layer_evals", "seconds")}
            events.append({"event": "stage", **changed, "active": active, "reason": "plateau"})
    if progress >= 1:
        totals = {"step": steps * 20, "layer_evals": compute, "flops": compute * 5.1e6, "seconds": compute / 4e5}
        events.append({"event": "end", **totals, "reason": "budget"})
    else:
        events.append({"event": "interrupted", "step": int(steps * progress) * 20, "layer_evals": compute * progress})
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if evaluated and progress >= 1:
        write_json(path / "evaluation.json", make_evaluation(names, accuracy, loss, contribution, rng))
    return path


def make_evaluation(
    names: list[str], accuracy: list[float], loss: list[float], contribution: list[float], rng: random.Random
) -> dict[str, Any]:
    """A test evaluation: `accuracy` by prefix, a confusion matrix, 24 examples of which half are mistakes."""
    classes = len(names)
    confusion = [[0] * classes for _ in names]
    for true in range(classes):
        for _ in range(1000):
            wrong = rng.choice([true, (true + 2) % classes, (true + 4) % classes, rng.randrange(classes)])
            confusion[true][true if rng.random() < accuracy[-1] else wrong] += 1
    examples = []
    for index in range(24):
        label = rng.randrange(classes)
        prediction = (label + rng.randrange(1, classes)) % classes if index < 12 else label
        by_prefix = [rng.choice([label, (label + 1) % classes]) for _ in accuracy]
        by_prefix[-1] = prediction
        examples.append(
            {
                "png": png(index), "label": label, "prediction": prediction, "confidence": rng.uniform(0.4, 0.999),
                "by_prefix": by_prefix,
            }
        )  # fmt: skip
    return {
        "split": "test", "samples": 10_000, "loss": loss, "accuracy": accuracy, "confusion": confusion,
        "contribution": contribution, "class_names": names, "examples": examples,
    }  # fmt: skip


def make_study(*, seeds: int = 3) -> dict[str, Any]:
    """A study of two budgets with serial and parallel rows."""
    rows = [
        ("serial depth 8", 0, 8, 0.856), ("serial depth 2", 0, 2, 0.868), ("PF 4×2 joint", 4, 8, 0.854),
        ("PF 4×2 cycle", 4, 8, 0.842), ("PF 4×2 one_pass", 4, 8, 0.855), ("PF 4×2 stagewise", 4, 8, 0.870),
        ("PF 4×2 stagewise, one-pass prefix losses", 4, 8, 0.872),
        ("PF 8×1 stagewise, one-pass prefix losses", 8, 8, 0.866),
        ("PF 2×4 stagewise, one-pass prefix losses", 2, 8, 0.869),
    ]  # fmt: skip
    groups = []
    for name, compute, gain in (("small budget", 2.6e9, 0.0), ("four times larger budget", 1.04e10, 0.03)):
        group: dict[str, Any] = {
            "name": name,
            "note": "the compute of 6 epochs of depth 8, times four for the larger",
            "rows": [],
        }
        for number, (label, branches, layers, value) in enumerate(rows):
            rng, prefixes = random.Random(number), max(branches, 1)
            accuracy = [
                [
                    value + gain + rng.gauss(0, 0.002) - 0.004 * (prefixes - k) * (k + 1 < prefixes)
                    for k in range(prefixes)
                ]
                for _ in range(seeds)
            ]
            curves = [
                [
                    (compute * i / 20, one[-1] * (1 - math.exp(-7 * (i / 20) ** 0.6)) + rng.gauss(0, 0.002))
                    for i in range(1, 21)
                ]
                for one in accuracy
            ]
            row = {"label": label, "layers": layers, "parameters": 50_048 * layers + 4_234, "layer_evals": compute}
            row |= {"seeds": list(range(seeds)), "accuracy": accuracy, "curves": curves}
            group["rows"].append(row | {"seconds": [compute / 4e5 * rng.uniform(0.9, 1.1) for _ in range(seeds)]})
        groups.append(group)
    return {
        "name": "schedules", "title": "Schedules of a ParaFormer on Fashion-MNIST",
        "question": "At equal compute, which order of learning makes the best network, and does it beat a serial one?",
        "findings": [
            "Stagewise training wins at both budgets; a serial net of depth 2 is within one standard deviation.",
            "The joint schedule leaves its prefixes far behind.",
        ],
        "groups": groups,
        "environment": {"cpu": "AMD EPYC 7B13", "cores": 2, "torch": "2.13.0+cpu", "precision": "float32"},
        "command": "paradepth study schedules",
    }  # fmt: skip
