"""Models: stem → trunk → head, one file per task, with a registry of named shapes and saving and loading."""

from paradepth.models.base import TrunkModel
from paradepth.models.causal_lm import CausalLM, CausalLMConfig
from paradepth.models.image_classifier import ImageClassifier, ImageClassifierConfig
from paradepth.models.pretrained import from_pretrained
from paradepth.models.registry import create_model, list_models, model_class, model_config

__all__ = [
    "CausalLM",
    "CausalLMConfig",
    "ImageClassifier",
    "ImageClassifierConfig",
    "TrunkModel",
    "create_model",
    "from_pretrained",
    "list_models",
    "model_class",
    "model_config",
]
