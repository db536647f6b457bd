"""Using a model on images, texts and sentences, whether its weights run in PyTorch or an exported file elsewhere."""

from paradepth.predict.images import predict_images
from paradepth.predict.model import Model
from paradepth.predict.tags import tag
from paradepth.predict.texts import check_tokenizer, predict_texts

__all__ = ["Model", "check_tokenizer", "predict_images", "predict_texts", "tag"]
