"""The plain PyTorch ViT that paradepth is measured against: nn.TransformerEncoderLayer, as most people would write it.

Shapes: B batch, C channels, H, W image height and width, T tokens, D width, N classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TorchViT(nn.Module):
    """Linear patch embedding, learned positions, pre-LN encoder layers, mean pooling, LayerNorm, linear classifier.

    Its parts have the dimensions of `paradepth`'s ViT, so both hold the same number of parameters.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        channels: int,
        num_classes: int,
        width: int,
        heads: int,
        mlp: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Linear(channels * patch_size**2, width)
        self.positions = nn.Parameter(torch.empty((image_size // patch_size) ** 2, width).normal_(std=0.02))
        layer = nn.TransformerEncoderLayer(
            width, heads, mlp, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        B, C, H, W = images_BCHW.shape
        p = self.patch_size
        x = images_BCHW.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
        x_BTD = self.embed(x.reshape(B, -1, C * p * p)) + self.positions
        return self.classify(self.norm(self.encoder(x_BTD).mean(dim=1)))
