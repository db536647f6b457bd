"""Image data: decoded once to uint8 tensors, split by seed, ordered and augmented as pure functions of a seed.

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
from paradepth.data.sources import DATA_NAMES

__all__ = ["DATA_NAMES", "Augment", "Batches", "ImageData", "ImageSplit", "load_images", "read_image"]
