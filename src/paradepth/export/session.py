"""Sessions of onnxruntime: one thread pool within operations, or another one across them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from paradepth.export.files import missing_extra

Execution = Literal["sequential", "parallel"]


def open_session(
    source: str | Path | bytes,
    *,
    threads: int | None = None,
    execution: Execution = "sequential",
    branches: int = 1,
    quiet: bool = False,
) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        source: a file, or its content.
        threads: threads in all; None leaves it to onnxruntime.
        execution: "sequential" evaluates one operation after another, each with all threads. "parallel" evaluates
            operations that do not depend on each other side by side, the branches of a model, say; threads are shared
            out over them.
        branches: how many there are, for "parallel".
        quiet: threads do not spin between calls, waiting for the next one: for measurements beside something else.

    Raises:
        ValueError: onnxruntime is not installed, options out of range, no such file, or it is no ONNX file.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise missing_extra("onnxruntime") from error
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    if execution not in ("sequential", "parallel"):
        raise ValueError(f"execution is {execution!r}; it must be 'sequential' or 'parallel'")
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError(f"{source}: no such file")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    if quiet:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if execution == "parallel":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    if threads is not None:
        across = min(threads, max(branches, 1)) if execution == "parallel" else 1
        options.inter_op_num_threads = across
        options.intra_op_num_threads = threads // across
    where = "the content" if isinstance(source, bytes) else str(source)
    try:
        return ort.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exceptions derive from Exception
        raise ValueError(f"{where} is not an ONNX file that onnxruntime can run: {error}") from error
