"""Images to classes.

Shapes: B batch, C channels, H, W image size, N classes, n prefixes.
"""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from paradepth.data.augment import Augment
from paradepth.data.batches import Batches
from paradepth.data.images import ImageData, ImageSplit, load_images
from paradepth.data.sources import DATA_NAMES
from paradepth.distributed import World
from paradepth.models import ImageClassifier
from paradepth.train.calibration import calibration_error
from paradepth.train.config import Config
from paradepth.train.evaluate import in_order
from paradepth.train.gates import gate_fields
from paradepth.train.tasks.base import Task


class ImageTask(Task):
    """Classifies images: one target a sample, batches augmented on their device."""

    model_class = ImageClassifier
    data_names: ClassVar[tuple[str, ...]] = DATA_NAMES
    kind = "images"
    own_options = ("image_size", "channels", "class_names", "flip", "crop_padding", "rand_augment")
    unit = "images"
    evaluation_batch = 500

    data: ImageData

    def __init__(self, config: Config, data: ImageData) -> None:
        super().__init__(config, data)
        d = config.data_options
        self.augment = Augment(flip=d.flip, crop_padding=d.crop_padding, rand_augment=d.rand_augment)

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        d = config.data_options
        data = load_images(
            d.data,
            data_dir=d.data_dir,
            image_size=d.image_size,
            channels=d.channels,
            validation_fraction=d.validation_fraction,
            train_fraction=d.train_fraction,
            seed=config.run_options.seed,
        )
        return cls(config, data if d.class_names is None else data.with_class_names(d.class_names))

    def data_shape(self) -> dict[str, Any]:
        return {
            "image_size": self.data.image_size,
            "channels": self.data.channels,
            "num_classes": self.data.num_classes,
            "class_names": self.data.class_names,
        }

    def normalise(self, model: ImageClassifier) -> None:
        model.stem.set_normalisation(self.data.mean, self.data.std)

    def count(self, split: str) -> int:
        return len(self._split(split))

    def _split(self, name: str) -> ImageSplit:
        return getattr(self.data, name)

    def batches(self, world: World) -> Batches:
        size, seed = self.config.optimiser_options.batch_size, self.config.run_options.seed
        return Batches(
            self.data.train, batch_size=size, seed=seed, rank=world.rank, world_size=world.size, drop_last=True
        )

    def prepare(self, inputs: Tensor, targets: Tensor, *, step: int, first: int) -> tuple[Tensor, Tensor]:
        seed, total = self.config.run_options.seed, self.config.optimiser_options.batch_size
        return self.augment(inputs, seed=_draw_seed(seed, step), first=first, total=total), targets

    def ordered(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        chosen = self._split(split)
        return chosen.images_NCHW[start:stop].float() / 255, chosen.labels_N[start:stop]

    @torch.no_grad()
    def details(self, model: ImageClassifier, split: str, *, examples: int = 24) -> dict[str, Any]:
        """Means by prefix, confusion matrix of the full model, and example predictions.

        Examples are the first samples of the split: as many mistakes as there are, up to half, the rest right.
        """
        from torchmetrics.functional.classification import multiclass_confusion_matrix  # slow to import

        was_training = model.training
        model.eval()
        samples = self._split(split)
        log_p_nBN = torch.cat(
            [model.prefix_logits(images_BCHW).double().log_softmax(dim=-1) for images_BCHW, _ in in_order(self, split)],
            dim=1,
        )
        contribution_nB = model.contributions(self.ordered(split, 0, self.evaluation_batch)[0])
        model.train(was_training)
        labels_nB1 = samples.labels_N.expand(len(log_p_nBN), -1).unsqueeze(-1)
        loss_n = -log_p_nBN.gather(2, labels_nB1).squeeze(-1).mean(dim=1)
        predicted_nB = log_p_nBN.argmax(dim=-1)
        right_nB = predicted_nB == samples.labels_N
        confusion = multiclass_confusion_matrix(
            predicted_nB[-1], samples.labels_N, num_classes=model.config.num_classes
        )
        wrong = (~right_nB[-1]).nonzero().flatten().tolist()[: examples // 2]
        right = right_nB[-1].nonzero().flatten().tolist()[: examples - len(wrong)]
        return {
            "split": split,
            "samples": len(samples),
            "loss": loss_n.tolist(),
            "accuracy": right_nB.double().mean(dim=1).tolist(),
            "calibration_error": calibration_error(log_p_nBN.exp(), samples.labels_N),
            "contribution": contribution_nB.double().mean(dim=1).tolist(),
            **self.measures(loss_n.tolist(), split),
            **gate_fields(model, self, split),
            "confusion": confusion.tolist(),
            "class_names": list(self.data.class_names),
            "examples": [
                {
                    "png": _png(samples.images_NCHW[i]),
                    "label": int(samples.labels_N[i]),
                    "prediction": int(predicted_nB[-1, i]),
                    "confidence": float(log_p_nBN[-1, i].max().exp()),
                    "by_prefix": predicted_nB[:, i].tolist(),
                }
                for i in wrong + right
            ],
        }


def _draw_seed(seed: int, step: int) -> int:
    digest = hashlib.blake2b(f"augment/{seed}/{step}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _png(image_CHW: Tensor) -> str:
    array = image_CHW.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3]))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
