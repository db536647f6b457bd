"""Tensor parallelism: every layer of the serial network cut across, heads and hidden units shared out evenly.

Shapes: B batch, T tokens, D width, H heads of this process, K width of a head, M hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from networks import Case
from share import Setting, Way, Whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from paradepth.nn import EncoderLayer


class HeadwiseLayer(nn.Module):
    """An `EncoderLayer` whose rows of Q, K and V are in the order of heads, so that a contiguous part of them belongs
    to whole heads; the same function with the same number of weights. Its four linear maps may be cut: `qkv` and `up`
    by outputs, `out` and `down` by inputs."""

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        heads, width = layer.attention.heads, layer.attention.out.in_features
        self.head_width = width // heads
        self.attention_norm, self.mlp_norm = layer.attention_norm, layer.mlp_norm
        self.qkv: nn.Module = layer.attention.qkv
        self.out: nn.Module = layer.attention.out
        self.up: nn.Module = layer.mlp.up
        self.down: nn.Module = layer.mlp.down
        with torch.no_grad():
            for tensor in (layer.attention.qkv.weight, layer.attention.qkv.bias):
                by_map = tensor.view(3, heads, self.head_width, -1)
                tensor.copy_(by_map.transpose(0, 1).reshape(tensor.shape))

    def forward(self, x_BTD: Tensor, *, step: float = 1.0) -> Tensor:
        assert step == 1.0, step
        B, T, _ = x_BTD.shape
        qkv = self.qkv(self.attention_norm(x_BTD)).view(B, T, -1, 3, self.head_width)
        q_BHTK, k_BHTK, v_BHTK = qkv.permute(3, 0, 2, 1, 4)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK)
        x_BTD = x_BTD + self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1))
        return x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD))))


class TensorParallel(Whole):
    """Every process has stem, head, norms and its part of every layer's linear maps: two sums of a state a layer
    forward, two backward. Stem, head and norms see the same values everywhere, so their gradients need no message."""

    def __init__(self, setting: Setting, cut: Callable[[HeadwiseLayer, Setting], None]) -> None:
        self.setting = setting
        self.model = setting.size.network().to(setting.device).train(setting.case.training)
        layers = self.model.trunk.layers
        for index, layer in enumerate(layers):
            layers[index] = HeadwiseLayer(layer)
            cut(layers[index], setting)

    def payload(self, case: Case) -> int:
        state = self.setting.size.state_bytes(self.model, case.batch)
        return (4 if case.training else 2) * self.setting.size.layers * state


def cut_by_dtensor(layer: HeadwiseLayer, setting: Setting) -> None:
    """The linear maps become DTensors."""
    mesh = init_device_mesh(setting.device.type, (setting.processes,))
    plan = {"qkv": ColwiseParallel(), "out": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)


def cut_by_fairscale(layer: HeadwiseLayer, setting: Setting) -> None:
    """The linear maps become fairscale's, which are Megatron-LM's."""
    from fairscale_peers import column_parallel, row_parallel

    parts: dict[str, Callable[[Any, Setting], nn.Module]] = {
        "qkv": column_parallel,
        "out": row_parallel,
        "up": column_parallel,
        "down": row_parallel,
    }
    for name, cut in parts.items():
        setattr(layer, name, cut(getattr(layer, name), setting))


def why_not(heads: int, processes: int) -> str | None:
    """Why layers with so many heads cannot be cut evenly; None where they can."""
    if heads % processes:
        return f"{heads} heads cannot be shared out evenly between {processes} processes"
    return None


def ways(serial: str) -> list[Way]:
    """By DTensor, and by fairscale."""
    return [
        Way(serial, "tensor parallel (DTensor)", lambda setting: TensorParallel(setting, cut_by_dtensor)),
        Way(
            serial,
            "tensor parallel (fairscale)",
            lambda setting: TensorParallel(setting, cut_by_fairscale),
            optional=True,
        ),
    ]
