"""Words to their tags.

Shapes: B samples, T words, F numbers of a word, W words of a split, N classes, n prefixes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from paradepth.data.padded import PaddedBatches, Ragged, mean_length
from paradepth.data.seeds import generator
from paradepth.data.tag_data import UNSEEN as UNSEEN_LABEL
from paradepth.data.tag_data import UNTAGGED, TaggedData, TaggedSplit, encode_treebank
from paradepth.data.treebank import TAGGED_NAMES, load_tagged
from paradepth.data.words import FILE, OWN, PADDING, UNKNOWN, load_words
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
        self.tally_size = 1 + len(_PARTS) if data.tags == "both" else 0
        self._label_parts = _numbered_parts((*data.class_names, *data.unseen_names))
        self._splits: dict[str, TaggedSplit] = {
            name: getattr(data, name).sampled(context, pack=d.pack) for name in ("train", "validation", "test")
        }
        self._order = {name: split.rows.lengths_N.argsort(stable=True) for name, split in self._splits.items()}

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        d = config.data_options
        treebank = load_tagged(
            d.data,
            data_dir=d.data_dir,
            validation_fraction=d.validation_fraction,
            train_fraction=d.train_fraction,
            seed=config.run_options.seed,
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

    def mean_tokens(self, model: Any) -> int:
        return mean_length(self._splits["train"].rows.lengths_N)

    def batches(self, world: World) -> PaddedBatches:
        split = self._splits["train"]
        if int(split.labels.flat.min()) <= UNSEEN_LABEL:
            raise ValueError(
                f"the training sentences of {self.data.name!r} have labels that this run does not know, such as "
                f"{self.data.unseen_names[0]!r}: they are not those that it began with"
            )
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
        targets_BT = torch.where(labels_BT < 0, labels_BT - UNTAGGED + IGNORED, labels_BT)
        return self.data.words(split, chosen_B), targets_BT

    def prepare(self, inputs: Tensor, targets: Tensor, *, step: int, first: int) -> tuple[Tensor, Tensor]:
        """Word dropout: some words lose the rows that are theirs alone, as words that were never seen have none."""
        if not self.word_dropout:
            return inputs, targets
        B, T, _ = inputs.shape
        draws = generator(self.config.run_options.seed, "word dropout", step)
        # As wide as any batch, so that a row's draws do not depend on how far it is padded.
        drop_BT = torch.rand(first + B, self.shape.context, generator=draws)[first:, :T] < self.word_dropout
        drop_BT = drop_BT.to(inputs.device) & (inputs[..., 0] != PADDING)
        own_BTF = inputs[..., :OWN].masked_fill(drop_BT[..., None], UNKNOWN)
        return torch.cat([own_BTF, inputs[..., OWN:]], dim=-1), targets

    # ---- evaluation ----------------------------------------------------------------------------------------

    def tally(self, logits_nMN: Tensor, targets_M: Tensor) -> Tensor:
        """Of pairs: words that count, and those whose part of speech or whose features are right."""
        counted_M = targets_M != IGNORED
        predicted_nM = logits_nMN.argmax(dim=-1)[:, counted_M]
        gold_M = targets_M[counted_M]
        # The parts of every label, those of the classes in front of those that are none.
        place_M = torch.where(gold_M < 0, UNSEEN - gold_M + len(self.data.class_names), gold_M)
        parts_P2 = self._label_parts.to(gold_M.device)
        right_nM2 = parts_P2[predicted_nM] == parts_P2[place_M]
        counted_n1 = right_nM2.new_full((len(right_nM2), 1), len(gold_M), dtype=torch.float64)
        return torch.cat([counted_n1, right_nM2.double().sum(dim=1)], dim=1)

    def scores(self, tally_nK: Tensor) -> dict[str, list[float]]:
        """Of pairs: accuracy of the parts of speech and of the features, whatever the other part is."""
        share_n2 = tally_nK[:, 1:] / tally_nK[:, :1].clamp(min=1)
        return {f"{part}_accuracy": share_n2[:, i].tolist() for i, part in enumerate(_PARTS)}

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
        """Means by prefix, confusion of parts of speech, example sentences."""
        predicted_nW = self.predictions(model, split)
        report = super().details(model, split)
        report["words"] = len(predicted_nW[0])
        report["unseen_labels"] = int((self._splits[split].labels.flat <= UNSEEN_LABEL).sum())
        if self.data.tags == "upos":
            report["confusion"] = self._confusion(predicted_nW[-1], split)
            report["class_names"] = list(self.data.class_names)
        return {**report, "examples": self._examples(predicted_nW[-1], split)}

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


def _numbered_parts(labels: Sequence[str]) -> Tensor:
    """Numbers of the two parts of labels such as "NOUN|Number=Sing", (labels, 2): equal where the texts are equal."""
    columns = [[label.partition("|")[place] for label in labels] for place in (0, 2)]
    numbers = [{text: i for i, text in enumerate(dict.fromkeys(column))} for column in columns]
    return torch.tensor([[n[text] for text in column] for n, column in zip(numbers, columns, strict=True)]).T
