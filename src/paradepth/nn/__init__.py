"""Building blocks: tensors in, tensors out. Nothing here knows of trunks, executors, devices or training."""

from paradepth.nn.attention import CrossAttention, MultiHeadAttention
from paradepth.nn.cache import KeyValueCache
from paradepth.nn.dropout import Dropout, dropout_keys, set_dropout_key
from paradepth.nn.feed_forward import FeedForward
from paradepth.nn.heads import ClassifierHead, LanguageModelHead
from paradepth.nn.joint_layers import SourceLayer, TargetLayer
from paradepth.nn.layer import EncoderLayer
from paradepth.nn.stem import PatchStem
from paradepth.nn.token_stem import TokenStem

__all__ = [
    "ClassifierHead",
    "CrossAttention",
    "Dropout",
    "EncoderLayer",
    "FeedForward",
    "KeyValueCache",
    "LanguageModelHead",
    "MultiHeadAttention",
    "PatchStem",
    "SourceLayer",
    "TargetLayer",
    "TokenStem",
    "dropout_keys",
    "set_dropout_key",
]
