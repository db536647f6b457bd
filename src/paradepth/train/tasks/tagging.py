"""Words to their tags.

Shapes: B samples, T words, F numbers of a word, W words of a split, N classes, n prefixes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from paradepth.data.padded import PaddedBatches, Ragged
from paradepth.data.seeds import generator
from paradepth.data.tag_data import UNSEEN as UNSEEN_LABEL
from paradepth.data.tag_data import UNTAGGED, TaggedData, TaggedSplit, encode_treebank
from paradepth.data.treebank import TAGGED_NAMES, load_tagged
from paradepth.data.words import FILE, PADDING, UNKNOWN, load_words
from paradepth.distributed import World
from paradepth.models import Tagger
from paradepth.train.config import Config
from paradepth.train.step import IGNORED, UNSEEN
from paradepth.train.tasks.base import Task

_EVALUATED_WORDS = 2**14  # at a time: their logits of every prefix are in memory together
_PARTS = ("upos", "features")
_EXAMPLES = 24


class TaggingTask(Task):
    """Predicts the tag of every word: its part of speech, the whole bundle of its features, or the pair of them.

    A sample is a sentence; longer ones than the model's context are cut into even pieces, and with `pack` sentences
    that follow each other share a sample as long as they fit. A label that the training sentences do not have counts
    as a mistake, whatever is predicted; its loss is left out.

    Raises:
        ValueError: also for a word dropout out of range.
    """

    model_class = Tagger
    data_names: ClassVar[tuple[str, ...]] = TAGGED_NAMES
    kind = "tagged sentences"
    own_options = ("tags", "pack", "word_dropout")

    data: TaggedData

    def __init__(self, config: Config, data: TaggedData) -> None:
        super().__init__(config, data)
        d = config.data_options
        context: int = self.shape.context
        self.unit = f"samples of up to {context} words" if d.pack else "sentences"
        self.evaluation_batch = max(1, _EVALUATED_WORDS // context)
        self.word_dropout = d.word_dropout or 0.0
        if not 0 <= self.word_dropout < 1:
            raise ValueError(f"word_dropout is {d.word_dropout}; it must be at least 0 and below 1")
        self._splits: dict[str, TaggedSplit] = {
            name: getattr(data, name).sampled(context, pack=d.pack) for name in ("train", "validation", "test")
        }
        self._order = {name: split.rows.lengths_N.argsort(stable=True) for name, split in self._splits.items()}

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        d = config.data_options
        treebank = load_tagged(
            d.data, data_dir=d.data_dir, validation_fraction=d.validation_fraction, seed=config.run_options.seed
        )
        vocabulary, names = None, None
        if assets is not None and (assets / FILE).is_file():
            vocabulary = load_words(assets)
            if assets != config.run_options.init:  # a model that is continued has its labels, a new one the data's
                names = json.loads((assets / "config.json").read_text())["model"]["class_names"]
        return cls(config, encode_treebank(treebank, d.tags or "upos", vocabulary=vocabulary, class_names=names))

    def save_assets(self, folder: Path) -> None:
        self.data.vocabulary.save(folder)

    def data_shape(self) -> dict[str, Any]:
        vocabulary, names = self.data.vocabulary, self.data.class_names
        return {
            "vocab_size": vocabulary.size,
            "features": vocabulary.features,
            "num_classes": len(names),
            "class_names": names,
        }

    def count(self, split: str) -> int:
        return len(self._splits[split])

    # ---- training ------------------------------------------------------------------------------------------

    def batches(self, world: World) -> PaddedBatches:
        split = self._splits["train"]
        return PaddedBatches(
            split.rows.lengths_N,
            lambda chosen_B: self._collated(split, chosen_B),
            batch_size=self.config.optimiser_options.batch_size,
            seed=self.config.run_options.seed,
            rank=world.rank,
            world_size=world.size,
        )

    def _collated(self, split: TaggedSplit, chosen_B: Tensor) -> tuple[Tensor, Tensor]:
        labels_BT = split.labels.padded(chosen_B, pad=UNTAGGED)
        targets_BT = labels_BT.masked_fill(labels_BT == UNTAGGED, IGNORED)
        return self.data.words(split, chosen_B), targets_BT.masked_fill(labels_BT == UNSEEN_LABEL, UNSEEN)

    def prepare(self, inputs: Tensor, targets: Tensor, *, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Word dropout: some words lose the row that is theirs alone, as words that were never seen have none."""
        if not self.word_dropout:
            return inputs, targets
        own_BT = inputs[..., 0]
        B, T = own_BT.shape
        draws = generator(self.config.run_options.seed, "word dropout", step)
        # As wide as any batch, so that a row's draws do not depend on how far it is padded.
        drop_BT = torch.rand(first + B, self.shape.context, generator=draws)[first:, :T] < self.word_dropout
        own_BT = own_BT.masked_fill(drop_BT.to(inputs.device) & (own_BT != PADDING), UNKNOWN)
        return torch.cat([own_BT[..., None], inputs[..., 1:]], dim=-1), targets

    # ---- evaluation ----------------------------------------------------------------------------------------

    def ordered(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The samples in the order of their lengths, so that little of a batch is padding."""
        return self._collated(self._splits[split], self._order[split][start:stop])

    @torch.no_grad()
    def predictions(self, model: Tagger, split: str) -> Tensor:
        """Class that each prefix gives each word, (n, W), words in the order of the sentences."""
        was_training = model.training
        model.eval()
        rows = self._splits[split].rows
        places = Ragged(torch.arange(len(rows.flat), device=rows.flat.device), rows.lengths_N)
        predicted_nW = torch.empty(model.prefixes, len(rows.flat), dtype=torch.int64, device=rows.flat.device)
        for chosen_B in self._order[split].split(self.evaluation_batch):
            place_BT = places.padded(chosen_B, pad=-1)
            classes_nBT = model.prefix_logits(self.data.words(self._splits[split], chosen_B)).argmax(dim=-1)
            predicted_nW[:, place_BT[place_BT >= 0]] = classes_nBT[:, place_BT >= 0]
        model.train(was_training)
        return predicted_nW

    def details(self, model: Tagger, split: str) -> dict[str, Any]:
        """Means by prefix, confusion of parts of speech or accuracy of either part of a pair, example sentences."""
        predicted_nW = self.predictions(model, split)
        report = super().details(model, split)
        report["words"] = len(predicted_nW[0])
        report["unseen_labels"] = int((self._splits[split].labels.flat == UNSEEN_LABEL).sum())
        if self.data.tags == "both":
            report |= self._part_accuracy(predicted_nW, split)
        if self.data.tags == "upos":
            report["confusion"] = self._confusion(predicted_nW[-1], split)
            report["class_names"] = list(self.data.class_names)
        return {**report, "examples": self._examples(predicted_nW[-1], split)}

    def _part_accuracy(self, predicted_nW: Tensor, split: str) -> dict[str, list[float]]:
        """Accuracy of the parts of speech and of the features in predicted pairs, over the words that have a label."""
        sentences, measured = self._splits[split].sentences, {}
        counted_W = self._splits[split].labels.flat != UNTAGGED
        for place, part in enumerate(_PARTS):
            of_class = [name.partition("|")[2 * place] for name in self.data.class_names]
            number = {value: i for i, value in enumerate(dict.fromkeys(of_class))}
            of_class_N = torch.tensor([number[value] for value in of_class], device=predicted_nW.device)
            gold = [number.get(value, -1) for sentence in sentences for value in getattr(sentence, part)]
            gold_W = torch.tensor(gold, device=predicted_nW.device)
            right_nW = (of_class_N[predicted_nW] == gold_W)[:, counted_W]
            measured[f"{part}_accuracy"] = right_nW.double().mean(dim=1).tolist()
        return measured

    def _confusion(self, predicted_W: Tensor, split: str) -> list[list[int]]:
        """Words by their class (rows) and by what was predicted (columns)."""
        labels_W, N = self._splits[split].labels.flat.long(), len(self.data.class_names)
        known_W = labels_W >= 0
        pairs_W = labels_W[known_W] * N + predicted_W[known_W]
        return pairs_W.bincount(minlength=N * N).view(N, N).tolist()

    def _examples(self, predicted_W: Tensor, split: str) -> list[dict[str, list[str]]]:
        """The first sentences of the split: as many with mistakes as there are, up to half, the rest without."""
        names, position = self.data.class_names, 0
        wrong, right = [], []
        predicted = predicted_W.tolist()
        for sentence in self._splits[split].sentences:
            found = [names[i] for i in predicted[position : position + len(sentence.words)]]
            position += len(sentence.words)
            labels = list(sentence.labels(self.data.tags))
            told = {"words": list(sentence.words), "labels": labels, "prediction": found}
            (right if labels == found else wrong).append(told)
        wrong = wrong[: _EXAMPLES // 2]
        return wrong + right[: _EXAMPLES - len(wrong)]
