"""Sentences to their translations.

Shapes: B pairs, S source tokens, T target tokens.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from paradepth.data.padded import PaddedBatches, mean_length
from paradepth.data.pairs import PAIR_NAMES, PairData, PairSplit, load_pairs
from paradepth.data.tokenizer import check_vocabulary
from paradepth.distributed import World
from paradepth.models import Translator, translate
from paradepth.train.config import Config
from paradepth.train.step import IGNORED
from paradepth.train.tasks.base import Task

EVALUATION_BEAMS = 4
_EVALUATED = 64  # pairs at a time
_EXAMPLES = 20


class TranslationTask(Task):
    """Predicts every next token of the target from the source and the target tokens before it (teacher forcing).

    Pairs that are longer than the model's context are left out of training, with a warning that counts them; in
    validation and test they are cut. Final measurements also translate: sacreBLEU and chrF of beam search.
    """

    model_class = Translator
    data_names: ClassVar[tuple[str, ...]] = PAIR_NAMES
    kind = "pairs of sentences"
    own_options = ("languages", "tokenizer", "vocab_size")
    score_names = ("bleu", "chrf")
    unit = "pairs"
    evaluation_batch = _EVALUATED

    data: PairData

    def __init__(self, config: Config, data: PairData) -> None:
        super().__init__(config, data)
        check_vocabulary(data.tokenizer, self.shape.vocab_size)
        self.context: int = self.shape.context
        self.data = data.without_long(self.context)
        self._order = {s: _by_length(getattr(self.data, s)) for s in ("train", "validation", "test")}

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        d = config.data_options
        data = load_pairs(
            d.data,
            data_dir=d.data_dir,
            languages=d.languages,
            validation_fraction=d.validation_fraction,
            train_fraction=d.train_fraction,
            tokenizer=d.tokenizer,
            vocab_size=d.vocab_size,
            seed=config.run_options.seed,
            assets=assets,
        )
        task = cls(config, data)
        if task.data.blank or task.data.long:
            warnings.warn(
                f"training pairs that are left out: {task.data.blank} with a blank side, {task.data.long} with a side "
                f"longer than {task.context} tokens",
                stacklevel=2,
            )
        return task

    def save_assets(self, folder: Path) -> None:
        self.data.tokenizer.save(folder)

    def data_shape(self) -> dict[str, Any]:
        tokenizer = self.data.tokenizer
        return {"vocab_size": tokenizer.vocab_size, "pad": tokenizer.special("<pad>")}

    def count(self, split: str) -> int:
        return len(getattr(self.data, split))

    def mean_tokens(self, model: Any) -> tuple[int, int]:
        split = self.data.train
        # The last token of a target is predicted only.
        return mean_length(split.sources.lengths_N), mean_length(split.targets.lengths_N - 1)

    def batches(self, world: World) -> PaddedBatches:
        split = self.data.train
        return PaddedBatches(
            torch.stack([split.sources.lengths_N, split.targets.lengths_N], dim=1),
            lambda chosen_B: self._collated(split, chosen_B),
            batch_size=self.config.optimiser_options.batch_size,
            seed=self.config.run_options.seed,
            rank=world.rank,
            world_size=world.size,
        )

    def _collated(self, split: PairSplit, chosen_B: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        pad = self.data.tokenizer.special("<pad>")
        source_BS = split.sources.padded(chosen_B, pad=pad)[:, : self.context]
        target_BT = split.targets.padded(chosen_B, pad=pad)
        wanted_BT = split.targets.padded(chosen_B, pad=IGNORED)
        return (source_BS, target_BT[:, :-1][:, : self.context]), wanted_BT[:, 1:][:, : self.context]

    def ordered(self, split: str, start: int, stop: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The pairs in the order of their lengths, so that little of a batch is padding."""
        return self._collated(getattr(self.data, split), self._order[split][start:stop])

    def outputs(self, model: Translator, split: str) -> dict[str, Any]:
        """sacreBLEU and chrF by prefix, of beam search, with their signatures, and the first translations."""
        from sacrebleu.metrics.bleu import BLEU  # an extra
        from sacrebleu.metrics.chrf import CHRF

        was_training = model.training
        model.eval()
        texts = getattr(self.data, split).texts
        sources, references = ([pair[side] for pair in texts] for side in (0, 1))
        options: dict[str, Any] = {"beams": EVALUATION_BEAMS, "batch_size": _EVALUATED}
        found = [
            translate(model, self.data.tokenizer, sources, branches=k, **options) for k in range(1, model.prefixes + 1)
        ]
        model.train(was_training)
        bleu, chrf = BLEU(), CHRF()
        scores = {
            name: [metric.corpus_score(translations, [references]).score for translations in found]
            for name, metric in (("bleu", bleu), ("chrf", chrf))
        }
        examples = [
            {"source": source, "reference": reference, "translation": translations[-1]}
            | ({"by_prefix": list(translations)} if model.prefixes > 1 else {})
            for source, reference, *translations in zip(sources, references, *found, strict=True)
        ]
        return {
            **scores,
            "signatures": {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())},
            "decoding": f"beam search, {EVALUATION_BEAMS} beams, score log p / length",
            "examples": examples[:_EXAMPLES],
        }


def _by_length(split: PairSplit) -> Tensor:
    return (split.sources.lengths_N + split.targets.lengths_N).argsort(stable=True)
