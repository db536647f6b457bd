"""Data: images as uint8 tensors, texts as tokens; split, ordered and augmented as pure functions of a seed.

>>> from paradepth.data import Augment, Batches, load_images
>>> data = load_images("digits", seed=0)
>>> batches = Batches(data.train, batch_size=64, seed=0)
>>> images_BCHW, labels_B = batches.get(pass_index=0, batch_index=0)
>>> Augment(crop_padding=1)(images_BCHW, seed=0).shape
torch.Size([64, 1, 8, 8])
"""

from paradepth.data.augment import Augment
from paradepth.data.batches import Batches
from paradepth.data.images import ImageData, ImageSplit, load_images, read_image
from paradepth.data.pairs import PAIR_NAMES, PairData, PairSplit, load_pairs
from paradepth.data.sources import DATA_NAMES
from paradepth.data.synthetic import SEQUENCE_NAMES, SequenceData
from paradepth.data.text import TEXT_NAMES, TextData, load_text
from paradepth.data.text_batches import TextBatches
from paradepth.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_of
from paradepth.data.treebank import TAGGED_NAMES, Treebank, load_tagged
from paradepth.data.words import WordVocabulary, load_words, split_words

__all__ = [
    "DATA_NAMES",
    "PAIR_NAMES",
    "SEQUENCE_NAMES",
    "TAGGED_NAMES",
    "TEXT_NAMES",
    "Augment",
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "ImageData",
    "ImageSplit",
    "PairData",
    "PairSplit",
    "SequenceData",
    "TextBatches",
    "TextData",
    "Tokenizer",
    "Treebank",
    "WordVocabulary",
    "load_images",
    "load_pairs",
    "load_tagged",
    "load_text",
    "load_tokenizer",
    "load_words",
    "read_image",
    "split_words",
    "tokenizer_of",
]
