"""Models as ONNX files, which onnxruntime and many other runtimes read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paradepth.atomic import write_bytes
from paradepth.export.describe import graph_with_texts
from paradepth.export.files import Exported, check_target, missing_extra
from paradepth.export.graph import Graph
from paradepth.export.quiet import quiet
from paradepth.export.session import open_session
from paradepth.export.verify import TOLERANCE, verify
from paradepth.models.base import TrunkModel

_LARGEST = 2**31 - 2**20  # bytes of weights: a protobuf message ends at 2 GiB


def export_onnx(
    model: TrunkModel,
    path: str | Path,
    *,
    branches: int | None = None,
    prefixes: bool = False,
    assets: str | Path | None = None,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a model as an ONNX file, compared with PyTorch in onnxruntime before it gets its name.

    The batch is free, and for texts the number of tokens up to the model's context. Branches are independent parts of
    the graph, which a runtime may evaluate side by side. A translator is one graph of source and target: it gives the
    logits of a target that is there, without remembered keys and values.

    Args:
        model: any registered model; it is exported in float32.
        path: file, .onnx.
        branches: use the first branches only (default: all); the others are not in the file.
        prefixes: one output for each prefix, logits_1 … logits_n; logits_k depends on the first k branches only.
        assets: a run, or a folder with the model's tokenizer.json or words.json: put into the file, so that
            `paradepth predict FILE` takes texts.
        overwrite: replace a file.
        tolerance: largest absolute difference from PyTorch's logits that is allowed.

    Returns:
        The file, its description, and how it compares.

    Raises:
        ValueError: branches or prefixes that the model does not have, a name that does not end in .onnx or is taken,
            weights of more than 2 GiB, or onnx, onnxscript or onnxruntime are not installed.
        ExportMismatch: the file would not compute what PyTorch computes.

    >>> import paradepth, tempfile
    >>> model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=4, branches=2, depth=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export_onnx(model, Path(folder) / "model.onnx", prefixes=True)
    >>> done.description["outputs"], done.verification.largest < 1e-4
    (['logits_1', 'logits_2'], True)
    """
    path = check_target(path, suffix=".onnx", overwrite=overwrite)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    graph, told, texts = graph_with_texts(model, branches=branches, prefixes=prefixes, assets=assets)
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.module.state_dict().values())
    if size > _LARGEST:
        raise ValueError(
            f"the model has {size / 2**30:.1f} GiB of weights, and an ONNX file holds 2; take format torch"
        )
    content = _onnx_bytes(graph, texts)
    session = open_session(content, threads=1)
    names = [spec.name for spec in graph.inputs]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(list(graph.outputs), feed)]

    verification = verify(graph, run, tolerance=tolerance)
    write_bytes(path, content)
    return Exported(path, told, verification, graph)


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise missing_extra(package) from error


def _onnx_bytes(graph: Graph, metadata: dict[str, str]) -> bytes:
    with quiet():
        made = torch.onnx.export(
            graph.program(),
            dynamo=True,
            verbose=False,
            input_names=[spec.name for spec in graph.inputs],
            output_names=list(graph.outputs),
        )
    assert made is not None
    _name_dimensions(made.model, graph)
    made.model.metadata_props.clear()  # of torch: the traced program in words
    made.model.metadata_props.update(metadata)
    return made.model_proto.SerializeToString()


def _name_dimensions(model: Any, graph: Graph) -> None:
    """Free dimensions have the symbols of a tracer; they get their own names."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, graph.inputs, strict=True):
        for size, name in zip(value.shape, spec.shape, strict=True):
            if isinstance(name, str):
                names[str(size)] = name
    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    for value in values:
        for place, size in enumerate(value.shape or ()):
            if str(size) in names:
                value.shape[place] = names[str(size)]
