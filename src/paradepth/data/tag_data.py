"""Tagged sentences as whole numbers, and the samples that they are cut or packed into.

    sentences   |the dog barks|yes|a long sentence of eight words indeed|
    context 5   |the dog barks|yes|a long sentence of|eight words indeed|      longer ones are cut into even pieces
    pack        |the dog barks yes|a long sentence of|eight words indeed|      short ones that follow each other join

However they are cut, samples are stretches of the same words, so every word is in exactly one.

Shape suffixes: U different words, F numbers of a word, N sentences or samples, B samples of a batch, T words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paradepth.data.padded import Ragged
from paradepth.data.tagged import NONE, Sentence, Tags
from paradepth.data.treebank import Treebank
from paradepth.data.words import WordVocabulary

# Labels that are no class: not annotated, or padding; and, counting down, those that the training sentences lack.
UNTAGGED, UNSEEN = -1, -2


@dataclass(frozen=True)
class TaggedSplit:
    """Samples of a split.

    Attributes:
        sentences: the sentences.
        rows: of each word its row in `TaggedData.table_UF`, sample by sample.
        labels: of each word its class, `UNTAGGED`, or `UNSEEN` − i for the i-th of `TaggedData.unseen_names`.
    """

    sentences: tuple[Sentence, ...]
    rows: Ragged
    labels: Ragged

    def __len__(self) -> int:
        return len(self.rows)

    def sampled(self, context: int, *, pack: bool = False) -> TaggedSplit:
        """The same words in other samples, see :func:`sample_lengths`."""
        lengths_N = sample_lengths([len(sentence.words) for sentence in self.sentences], context, pack=pack)
        lengths_N = lengths_N.to(self.rows.flat.device)
        return replace(self, rows=Ragged(self.rows.flat, lengths_N), labels=Ragged(self.labels.flat, lengths_N))

    def to(self, device: torch.device | str) -> TaggedSplit:
        """The same samples with their numbers on another device."""
        return replace(self, rows=self.rows.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class TaggedData:
    """A treebank, ready for training.

    Attributes:
        name: of the treebank.
        tags: what is predicted.
        vocabulary: of the words.
        class_names: the labels of the training sentences, sorted.
        unseen_names: labels of the other sentences that are none of these, sorted.
        table_UF: numbers of the different words; row 0 is padding.
        train, validation, test: a sample is a sentence.
    """

    name: str
    tags: Tags
    vocabulary: WordVocabulary
    class_names: tuple[str, ...]
    unseen_names: tuple[str, ...]
    table_UF: Tensor
    train: TaggedSplit
    validation: TaggedSplit
    test: TaggedSplit

    def to(self, device: torch.device | str) -> TaggedData:
        """The same data with its numbers on another device."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, table_UF=self.table_UF.to(device), **splits)

    def words(self, split: TaggedSplit, chosen_B: Tensor) -> Tensor:
        """Numbers of the words of samples, int64 (B, T, F), T the words of the longest, padded with row 0."""
        return self.table_UF[split.rows.padded(chosen_B, pad=0)]


def encode_treebank(
    treebank: Treebank,
    tags: Tags,
    *,
    vocabulary: WordVocabulary | None = None,
    class_names: Sequence[str] | None = None,
) -> TaggedData:
    """Numbers for words and labels.

    Args:
        treebank: the sentences.
        tags: "upos", "features" or "both".
        vocabulary: None learns one from the training sentences.
        class_names: labels by class; None takes those of the training sentences.

    Raises:
        ValueError: unknown `tags`, a split without them, or training sentences with a single label.

    >>> dogs = Sentence(("dogs", "bark"), ("NOUN", "VERB"), ("Number=Plur", "_"))
    >>> data = encode_treebank(Treebank("dogs", (dogs,), (dogs,), (dogs,)), "upos")
    >>> data.class_names, data.test.labels[0].tolist(), data.words(data.test, torch.tensor([0])).shape
    (('NOUN', 'VERB'), [0, 1], torch.Size([1, 2, 11]))
    """
    if tags not in ("upos", "features", "both"):
        raise ValueError(f"tags is {tags!r}; it must be 'upos', 'features' or 'both'")
    splits = {"train": treebank.train, "validation": treebank.validation, "test": treebank.test}
    for split, sentences in splits.items():
        for name in ("upos", "features") if tags == "both" else (tags,):
            if all(value == NONE for sentence in sentences for value in getattr(sentence, name)):
                column = "part of speech (column 4)" if name == "upos" else "morphological features (column 6)"
                raise ValueError(f"tags is {tags!r}, but no word of the {split} sentences has a {column}")
    labels = {split: [sentence.labels(tags) for sentence in sentences] for split, sentences in splits.items()}
    if class_names is None:
        # A word without features is one of a kind, a word without part of speech is not annotated.
        absent = set() if tags == "features" else {NONE}
        class_names = sorted({label for sentence in labels["train"] for label in sentence} - absent)
        if len(class_names) < 2:
            raise ValueError(f"all training words have the same label, {class_names[0]!r}: there is nothing to learn")
    if vocabulary is None:
        vocabulary = WordVocabulary.learn(sentence.words for sentence in treebank.train)
    numbers = {label: number for number, label in enumerate(class_names)}
    if tags != "features":
        numbers[NONE] = UNTAGGED
    unseen = sorted({label for chosen in labels.values() for sentence in chosen for label in sentence} - set(numbers))
    numbers |= {label: UNSEEN - i for i, label in enumerate(unseen)}
    different = sorted({word for sentences in splits.values() for sentence in sentences for word in sentence.words})
    rows = {word: row for row, word in enumerate(different, start=1)}
    table_UF = torch.cat([torch.zeros(1, vocabulary.features).long(), vocabulary.encode([different])[0]])
    encoded = {
        split: TaggedSplit(
            sentences,
            Ragged.of([rows[word] for word in sentence.words] for sentence in sentences),
            Ragged.of([numbers[label] for label in sentence] for sentence in labels[split]),
        )
        for split, sentences in splits.items()
    }
    return TaggedData(treebank.name, tags, vocabulary, tuple(class_names), tuple(unseen), table_UF, **encoded)


def sample_lengths(lengths: Sequence[int], context: int, *, pack: bool = False) -> Tensor:
    """Words of each sample, when sentences are cut into samples of at most `context` words.

    Args:
        lengths: words of each sentence.
        context: most words of a sample; a longer sentence becomes the fewest pieces that are short enough, as even as
            they can be.
        pack: put sentences, or pieces of them, that follow each other into one sample as long as they fit.

    Raises:
        ValueError: a context below 1.

    >>> sample_lengths([3, 1, 8], 5).tolist(), sample_lengths([3, 1, 8], 5, pack=True).tolist()
    ([3, 1, 4, 4], [4, 4, 4])
    """
    if context < 1:
        raise ValueError(f"context is {context}; it must be at least 1 word")
    samples: list[int] = []
    for length in lengths:
        for piece in pieces(length, context):
            if pack and samples and samples[-1] + piece <= context:
                samples[-1] += piece
            else:
                samples.append(piece)
    return torch.tensor(samples, dtype=torch.int64)


def pieces(length: int, context: int) -> list[int]:
    """The fewest even pieces of at most `context` words.

    >>> pieces(9, 4), pieces(4, 4)
    ([3, 3, 3], [4])
    """
    count = -(-length // context)
    return [length * (i + 1) // count - length * i // count for i in range(count)]
