"""From a run directory to an exported file, its verification and its latency table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from paradepth.atomic import write_json
from paradepth.export.aoti import export_aoti, load_aoti
from paradepth.export.files import Exported
from paradepth.export.latency import latency_table, surroundings, warning
from paradepth.export.onnx_file import export_onnx
from paradepth.export.program import export_program, load_program
from paradepth.models.pretrained import from_pretrained

Format = Literal["onnx", "torch", "aoti"]
FOLDER = "exported"  # inside a run
_EXPORTERS: dict[str, tuple[Callable[..., Exported], str]] = {
    "onnx": (export_onnx, ".onnx"),
    "torch": (export_program, ".pt2"),
    "aoti": (export_aoti, ".aoti.pt2"),
}


def export_run(
    run: str | Path,
    *,
    format: Format = "onnx",
    branches: int | None = None,
    prefixes: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    latency: bool = True,
    threads: int | None = None,
) -> dict[str, Any]:
    """Exports the model of a run, with the files that it needs to be used.

    Args:
        run: run directory, or a folder with config.json and model.safetensors.
        format: "onnx", "torch" (a program of `torch.export`) or "aoti" (compiled by AOTInductor).
        branches: use the first branches only.
        prefixes: one output for each prefix.
        output: file; RUN/exported/model….onnx, .pt2 or .aoti.pt2 by default.
        overwrite: replace a file.
        latency: measure, for a few seconds.
        threads: of the measurement; None is PyTorch's present number.

    Returns:
        What was written, how it compares with PyTorch, and the latencies. The same lies beside the file, with its
        description and the machine, as FILE.json.

    Raises:
        ValueError: an unknown format, a run without weights, or what the exporter refuses.
        ExportMismatch: the file would not compute what PyTorch computes.
    """
    if format not in _EXPORTERS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(get_args(Format))}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    exporter, suffix = _EXPORTERS[format]
    model = from_pretrained(run)
    name = "model" + ("-prefixes" if prefixes else "") + (f"-{branches}" if branches is not None else "")
    path = Path(output) if output is not None else Path(run) / FOLDER / (name + suffix)
    done = exporter(model, path, branches=branches, prefixes=prefixes, assets=run, overwrite=overwrite)
    result: dict[str, Any] = {
        "run": str(run),
        "format": format,
        "file": str(done.path),
        "bytes": done.path.stat().st_size,
        "branches": done.description["branches"],
        "outputs": done.description["outputs"],
        "difference": done.verification.largest,
    }
    details = {
        **result,
        "differences": done.verification.difference,
        "shapes": done.verification.shapes,
        "description": done.description,
    }
    if latency:
        result["latency"] = details["latency"] = _latency(done, format, threads)
        details["machine"] = surroundings(threads)
        note = warning(details["machine"])
        if note:
            result["note"] = details["note"] = note
    beside = done.path.with_name(done.path.name + ".json")
    write_json(beside, details)
    return {**result, "details": str(beside)}


def _latency(done: Exported, format: str, threads: int | None) -> list[dict[str, Any]]:
    if format == "onnx":
        return latency_table(done.graph, onnx=done.path.read_bytes(), threads=threads)
    program, _ = (load_program if format == "torch" else load_aoti)(done.path)
    return latency_table(done.graph, run=program, threads=threads)
