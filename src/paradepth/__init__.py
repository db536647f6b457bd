"""paradepth: make Transformer depth run in parallel.

>>> import paradepth, torch
>>> model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=2, channels=1, branches=4, depth=2)
>>> model(torch.rand(2, 1, 8, 8)).shape
torch.Size([2, 10])
>>> model.prefix_logits(torch.rand(2, 1, 8, 8)).shape
torch.Size([4, 2, 10])
"""

from paradepth.depth import parallelize
from paradepth.models import convert, create_model, from_pretrained, list_models

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "create_model", "from_pretrained", "list_models", "parallelize"]
