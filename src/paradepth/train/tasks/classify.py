"""Texts and pairs of texts to classes.

Shapes: B batch, T tokens, N classes, M texts, n prefixes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from paradepth.data.labelled import LABELLED_NAMES, LabelledData, LabelledSplit, load_labelled
from paradepth.data.padded import PaddedBatches, mean_length
from paradepth.data.tokenizer import FILE, Tokenizer, check_vocabulary, load_tokenizer, tokenizer_of, with_specials
from paradepth.distributed import World
from paradepth.models import HFClassifier, SequenceClassifier, model_config
from paradepth.models.hf_classifier import hf_config
from paradepth.train.calibration import calibration_error
from paradepth.train.config import Config
from paradepth.train.depth import depth_processes
from paradepth.train.evaluate import evaluate, in_order
from paradepth.train.tasks.base import Task


class ClassifyTask(Task):
    """Classifies texts: one target a sample, batches of texts of similar lengths.

    Besides loss and accuracy a split has F1 (of class 1 where there are two classes, else the mean over classes) and
    Matthews' correlation, the scores of GLUE, from one confusion matrix.
    """

    model_class = SequenceClassifier
    data_names: ClassVar[tuple[str, ...]] = LABELLED_NAMES
    kind = "labelled texts"
    own_options = ("tokenizer", "vocab_size", "columns", "class_names")
    score_names = ("f1", "matthews")
    unit = "texts"
    evaluation_batch = 128

    data: LabelledData

    def __init__(self, config: Config, data: LabelledData) -> None:
        super().__init__(config, data)
        self.tally_size = len(data.class_names) ** 2
        self.unit = "pairs of texts" if data.pairs else "texts"
        # A compiled step is compiled anew for every length.
        self._length = self.shape.context if config.run_options.compile else None

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        # The task that a source was trained on may have done without special tokens.
        return cls(config, _load(config, None if assets is None else with_specials(source_tokenizer(assets))))

    def save_assets(self, folder: Path) -> None:
        self.data.tokenizer.save(folder)

    def data_shape(self) -> dict[str, Any]:
        tokenizer = self.data.tokenizer
        return {
            "vocab_size": tokenizer.vocab_size,
            "pad": tokenizer.special("<pad>"),
            "separator": tokenizer.special("</s>"),
            "num_classes": len(self.data.class_names),
            "class_names": self.data.class_names,
        }

    def split(self, name: str) -> LabelledSplit:
        """The samples of a split."""
        return self.data.splits[name]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.data.splits)

    def count(self, split: str) -> int:
        return len(self.split(split))

    @property
    def _pad(self) -> int:
        return self.data.tokenizer.special("<pad>")

    def mean_tokens(self, model: Any) -> int:
        if self._length is not None:
            return self._length
        return mean_length(self.split("train").tokens.lengths_N.clamp(max=model.tokens))

    def batches(self, world: World) -> PaddedBatches:
        train = self.split("train")
        return PaddedBatches(
            train.tokens.lengths_N,
            lambda indices_B: train.batch(indices_B, pad=self._pad, length=self._length),
            batch_size=self.config.optimiser_options.batch_size,
            seed=self.config.run_options.seed,
            rank=world.rank,
            world_size=world.size,
        )

    def ordered(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        chosen = self.split(split)
        places_B = torch.arange(start, min(stop, len(chosen)), device=chosen.labels_N.device)
        return chosen.batch(places_B, pad=self._pad)

    # ---- scores ------------------------------------------------------------------------------------------------

    def tally(self, logits_nMN: Tensor, targets_M: Tensor) -> Tensor:
        N = logits_nMN.shape[-1]
        cell_nM = targets_M * N + logits_nMN.argmax(dim=-1)
        return F.one_hot(cell_nM, N * N).double().sum(dim=1)

    def scores(self, tally_nK: Tensor) -> dict[str, list[float]]:
        """F1 and Matthews' correlation of each prefix, from its confusion matrix."""
        N = len(self.data.class_names)
        confusions = tally_nK.view(-1, N, N)
        return {"f1": [f1(c) for c in confusions], "matthews": [matthews(c) for c in confusions]}

    @torch.no_grad()
    def details(self, model: Any, split: str, *, examples: int = 24) -> dict[str, Any]:
        """Means by prefix, confusion matrix of the full model (rows are true classes), and example predictions: the
        first samples of the split, as many mistakes as there are, up to half, the rest right."""
        was_training = model.training
        model.eval()
        chosen = self.split(split)
        p_nMN = torch.cat(
            [model.prefix_logits(inputs).double().softmax(dim=-1) for inputs, _ in in_order(self, split)], dim=1
        )
        model.train(was_training)
        predicted_nM = p_nMN.argmax(dim=-1)
        right_M = predicted_nM[-1] == chosen.labels_N
        wrong = (~right_M).nonzero().flatten().tolist()[: examples // 2]
        right = right_M.nonzero().flatten().tolist()[: examples - len(wrong)]
        N = len(self.data.class_names)
        pairs_M = chosen.labels_N * N + predicted_nM[-1]
        found: dict[str, Any] = {
            **super().details(model, split),
            "calibration_error": calibration_error(p_nMN, chosen.labels_N),
            "confusion": pairs_M.bincount(minlength=N * N).view(N, N).tolist(),
            "class_names": list(self.data.class_names),
            "examples": [
                {
                    "text": list(chosen.texts[i]) if self.data.pairs else chosen.texts[i][0],
                    "label": int(chosen.labels_N[i]),
                    "prediction": int(predicted_nM[-1, i]),
                    "confidence": float(p_nMN[-1, i].max()),
                    "by_prefix": predicted_nM[:, i].tolist(),
                }
                for i in wrong + right
            ],
        }
        if self.data.notes:
            found["notes"] = list(self.data.notes)
        if split == "test" and "mismatched" in self.data.splits:
            other = evaluate(model, self, "mismatched", world=World(0, 1, model.device))
            found["mismatched"] = {"samples": self.count("mismatched"), "loss": other.loss, "accuracy": other.accuracy}
        return found


class HFClassifyTask(ClassifyTask):
    """Classifies texts by a pretrained encoder of the transformers library, with the tokeniser that came with it.

    Raises:
        ValueError: no encoder to start from, or layers that several processes would share.
    """

    model_class = HFClassifier

    def __init__(self, config: Config, data: LabelledData, hf: dict[str, Any]) -> None:
        self.hf = hf
        super().__init__(config, data)

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if depth_processes(config.depth_options) > 1:
            raise ValueError(
                f"{depth_processes(config.depth_options)} processes cannot share the layers of a transformers encoder; "
                "take --depth-processes 1"
            )

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        if assets is None:
            raise ValueError("model 'hf_classifier' starts from an encoder: paradepth finetune hf:FOLDER --task NAME")
        hf = hf_config(assets)
        tokenizer = transformers_tokenizer(assets)
        if tokenizer.vocab_size > hf.get("vocab_size", tokenizer.vocab_size):
            check_vocabulary(tokenizer, hf["vocab_size"])
        return cls(config, _load(config, tokenizer), hf)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.config, self.data.to(device), self.hf)

    def data_shape(self) -> dict[str, Any]:
        shape = super().data_shape()
        del shape["vocab_size"]
        return {**shape, "hf": self.hf}


def transformers_tokenizer(folder: Path) -> Tokenizer:
    """The tokeniser in a folder of the transformers library.

    Raises:
        ValueError: there is none that is described by a file tokenizer.json or can be written as one.
    """
    if (folder / FILE).is_file():
        return load_tokenizer(folder)
    try:
        import transformers

        fast = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with tempfile.TemporaryDirectory() as place:
            Path(place, FILE).write_text(fast.backend_tokenizer.to_str(), encoding="utf-8")
            return load_tokenizer(place)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder} has no tokenizer.json, and none can be made of what it has: {error}") from error


def f1(confusion_NN: Tensor) -> float:
    """F1 of class 1 of two, or the mean of all classes' F1 (macro); 0 for a class that is neither there nor predicted.

    Args:
        confusion_NN: samples by true class (rows) and prediction.

    >>> f1(torch.tensor([[3, 1], [2, 4]])) == 2 * 4 / (2 * 4 + 1 + 2)
    True
    """
    hits_N, true_N, predicted_N = confusion_NN.diagonal(), confusion_NN.sum(dim=1), confusion_NN.sum(dim=0)
    f1_N = 2 * hits_N.double() / (true_N + predicted_N).clamp(min=1)
    return float(f1_N[1] if len(f1_N) == 2 else f1_N.mean())


def matthews(confusion_NN: Tensor) -> float:
    """Matthews' correlation of truth and prediction, for any number of classes; 0 where one of them never varies.

    Args:
        confusion_NN: samples by true class (rows) and prediction.

    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient, 2004.

    >>> matthews(torch.tensor([[5, 0], [0, 5]])), matthews(torch.tensor([[5, 0], [5, 0]]))
    (1.0, 0.0)
    """
    c = confusion_NN.double()
    true_N, predicted_N, total = c.sum(dim=1), c.sum(dim=0), c.sum()
    covariance = c.diagonal().sum() * total - (true_N * predicted_N).sum()
    spread = (total**2 - true_N.square().sum()) * (total**2 - predicted_N.square().sum())
    return float(covariance / spread.sqrt()) if spread > 0 else 0.0


def _load(config: Config, tokenizer: Tokenizer | None) -> LabelledData:
    d, m = config.data_options, config.model_options
    return load_labelled(
        d.data,
        context=m.context or model_config(m.model).context,
        data_dir=d.data_dir,
        columns=d.columns,
        validation_fraction=d.validation_fraction,
        train_fraction=d.train_fraction,
        tokenizer=d.tokenizer or "bpe",
        vocab_size=d.vocab_size,
        seed=config.run_options.seed,
        class_names=d.class_names,
        chosen=tokenizer,
    )


def source_tokenizer(assets: Path) -> Tokenizer:
    """The tokeniser of a run or a saved model, checked against the model's vocabulary.

    Raises:
        ValueError: there is none, it is damaged, or it does not belong to the model.
    """
    try:
        vocabulary = json.loads((assets / "config.json").read_text())["model"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        tokenizer = load_tokenizer(assets)
        vocabulary = tokenizer.vocab_size
    else:
        tokenizer = tokenizer_of(assets, vocabulary)
    check_vocabulary(tokenizer, vocabulary)
    return tokenizer
