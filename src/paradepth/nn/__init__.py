"""Building blocks: tensors in, tensors out. Nothing here knows of trunks, executors, devices or training."""

from paradepth.nn.attention import MultiHeadAttention
from paradepth.nn.dropout import Dropout, set_dropout_key
from paradepth.nn.feed_forward import FeedForward
from paradepth.nn.heads import ClassifierHead
from paradepth.nn.layer import EncoderLayer
from paradepth.nn.stem import PatchStem

__all__ = [
    "ClassifierHead",
    "Dropout",
    "EncoderLayer",
    "FeedForward",
    "MultiHeadAttention",
    "PatchStem",
    "set_dropout_key",
]
