"""What branch_latency compares: networks of 12 layers of width 192, and the ways to evaluate them.

Shapes: B batch, C channels, H, W image height and width, T tokens, D width, N classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import paradepth
from paradepth.branches import Auto, Batched, Branches, BranchExecutor, Loop, Threads
from paradepth.export import export_onnx
from paradepth.export.session import Execution, open_session

Call = Callable[[], Any]

SERIAL_WAYS = {"eager", "nn.TransformerEncoder", "compiled"}  # to evaluate the serial network in PyTorch


@dataclass(frozen=True)
class Size:
    """Images and layers of one comparison."""

    image_size: int
    patch_size: int
    model: str  # the suffix of the registered names
    layers: int

    @property
    def serial(self) -> str:
        """The label of the serial network."""
        return f"1×{self.layers}"

    def shapes(self) -> list[tuple[int, int]]:
        """Branches and layers of each: all ways to write `layers` as a product with at least three branches."""
        return [(n, self.layers // n) for n in range(self.layers, 2, -1) if self.layers % n == 0]


SIZES = {
    "tiny": Size(224, 16, "tiny", 12),
    "smoke": Size(8, 4, "nano", 4),
}


@dataclass(frozen=True)
class Variant:
    """A way to evaluate a network: who (ours or whose), the network's shape, and a call that gives its logits."""

    shape: str
    way: str
    call: Call
    is_serial_torch: bool = False  # what a user of PyTorch has without branches


class FastPath(nn.Module):
    """The serial ViT's own stem and head around `nn.TransformerEncoder`, whose fast path runs in inference.

    Its weights are its own: only its speed is looked at.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        c = vit.config
        self.stem, self.head = vit.stem, vit.head
        layer = nn.TransformerEncoderLayer(
            c.width, c.heads, c.mlp, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, c.depth, enable_nested_tensor=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(images_BCHW)))


def executors(threads: int) -> dict[str, BranchExecutor]:
    """The branch executors that are worth a look with so many threads."""
    found: dict[str, BranchExecutor] = {"loop": Loop(), "batched": Batched()}
    if threads > 1:
        found["threads"] = Threads()
    return found | {"auto": Auto()}


def torch_variants(size: Size, images_BCHW: Tensor, *, threads: int, compiled: bool) -> Iterator[Variant]:
    """Every way to evaluate the serial network and the branches in PyTorch, in the dtype of the images."""
    dtype = images_BCHW.dtype
    vit = new_model(size, 0, size.layers).to(dtype)
    fast = FastPath(vit).to(dtype).eval()
    yield Variant(size.serial, "eager", lambda: vit(images_BCHW), True)
    yield Variant(size.serial, "nn.TransformerEncoder", lambda: fast(images_BCHW), True)
    if compiled:
        faster = torch.compile(vit, dynamic=False)
        yield Variant(size.serial, "compiled", lambda: faster(images_BCHW), True)
    for branches, depth in size.shapes():
        for way, executor in executors(threads).items():
            model = new_model(size, branches, depth).to(dtype)
            assert isinstance(model.trunk, Branches)
            model.trunk.executor = executor
            yield Variant(f"{branches}×{depth}", way, lambda model=model: model(images_BCHW))
        if compiled:  # a traced model evaluates its branches one after another, whatever the executor
            faster = torch.compile(new_model(size, branches, depth).to(dtype), dynamic=False)
            yield Variant(f"{branches}×{depth}", "compiled", lambda model=faster: model(images_BCHW))


def onnx_variants(size: Size, images_BCHW: Tensor, *, threads: int) -> Iterator[Variant]:
    """onnxruntime, one operator after another and, for branches, in its parallel mode as well; float32."""
    for branches, depth in [(0, size.layers), *size.shapes()]:
        label = f"{branches}×{depth}" if branches else size.serial
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(new_model(size, branches, depth), path)
            content = path.read_bytes()
        for mode in get_args(Execution):
            if mode == "parallel" and (not branches or threads == 1):
                continue
            session = open_session(content, threads=threads, execution=mode, branches=branches)
            feed = {session.get_inputs()[0].name: images_BCHW.numpy()}
            yield Variant(label, f"onnxruntime, {mode}", lambda session=session, feed=feed: session.run(None, feed))


def new_model(size: Size, branches: int, depth: int) -> Any:
    """A network with fresh weights, for inference."""
    torch.manual_seed(0)
    name = f"{'paraformer' if branches else 'vit'}_{size.model}"
    shape = {"image_size": size.image_size, "patch_size": size.patch_size, "channels": 3, "num_classes": 10}
    more = {"branches": branches} if branches else {}
    return paradepth.create_model(name, depth=depth, **more, **shape).eval()
