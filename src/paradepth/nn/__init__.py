"""Building blocks: tensors in, tensors out. Nothing here knows of trunks, executors, devices or training."""

from paradepth.nn.attention import CrossAttention, MultiHeadAttention
from paradepth.nn.cache import KeyValueCache
from paradepth.nn.dropout import Dropout, StackedDropout, dropout_keys, set_dropout_key
from paradepth.nn.feed_forward import FeedForward
from paradepth.nn.heads import ClassifierHead, LanguageModelHead, MaskedLMHead, TextClassifierHead, TokenClassifierHead
from paradepth.nn.joint_layers import SourceLayer, TargetLayer
from paradepth.nn.joint_stem import JointStem, TargetHead
from paradepth.nn.layer import EncoderLayer
from paradepth.nn.segment_stem import SegmentStem
from paradepth.nn.stacked import StackedLayers
from paradepth.nn.static_mixing import StaticMixing
from paradepth.nn.stem import PatchStem
from paradepth.nn.token_stem import TokenStem
from paradepth.nn.word_stem import WordStem

__all__ = [
    "ClassifierHead",
    "CrossAttention",
    "Dropout",
    "EncoderLayer",
    "FeedForward",
    "JointStem",
    "KeyValueCache",
    "LanguageModelHead",
    "MaskedLMHead",
    "MultiHeadAttention",
    "PatchStem",
    "SegmentStem",
    "SourceLayer",
    "StackedDropout",
    "StackedLayers",
    "StaticMixing",
    "TargetHead",
    "TargetLayer",
    "TextClassifierHead",
    "TokenClassifierHead",
    "TokenStem",
    "WordStem",
    "dropout_keys",
    "set_dropout_key",
]
