"""Models: stem → trunk → head, one file per task, with a registry of named shapes and saving and loading."""

from paradepth.models.base import TrunkModel
from paradepth.models.causal_lm import CausalLM, CausalLMConfig
from paradepth.models.convert import convert
from paradepth.models.early_stop import EarlyStop, Stopped, calibrate
from paradepth.models.generate import Generation, Piece, generate, generate_stream
from paradepth.models.hf_classifier import HFClassifier, HFClassifierConfig
from paradepth.models.image_classifier import ImageClassifier, ImageClassifierConfig
from paradepth.models.masked_lm import MaskedLM, MaskedLMConfig, fill_mask
from paradepth.models.pretrained import from_pretrained, register_model_type
from paradepth.models.registry import create_model, list_models, model_class, model_config, register_model
from paradepth.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig
from paradepth.models.shape import TrunkConfig
from paradepth.models.tagger import Tagger, TaggerConfig
from paradepth.models.translator import Translator, TranslatorConfig, translate

__all__ = [
    "CausalLM",
    "CausalLMConfig",
    "EarlyStop",
    "Generation",
    "HFClassifier",
    "HFClassifierConfig",
    "ImageClassifier",
    "ImageClassifierConfig",
    "MaskedLM",
    "MaskedLMConfig",
    "Piece",
    "SequenceClassifier",
    "SequenceClassifierConfig",
    "Stopped",
    "Tagger",
    "TaggerConfig",
    "Translator",
    "TranslatorConfig",
    "TrunkConfig",
    "TrunkModel",
    "calibrate",
    "convert",
    "create_model",
    "fill_mask",
    "from_pretrained",
    "generate",
    "generate_stream",
    "list_models",
    "model_class",
    "model_config",
    "register_model",
    "register_model_type",
    "translate",
]
