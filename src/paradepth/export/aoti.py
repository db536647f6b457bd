"""Models compiled ahead of time by AOTInductor: a package with machine code for the processor it was made on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from paradepth.atomic import write_bytes
from paradepth.export.describe import KEY, graph_with_texts, read_description
from paradepth.export.files import Exported, check_target
from paradepth.export.quiet import quiet
from paradepth.export.verify import TOLERANCE, verify
from paradepth.models.base import TrunkModel


def export_aoti(
    model: TrunkModel,
    path: str | Path,
    *,
    branches: int | None = None,
    prefixes: bool = False,
    assets: str | Path | None = None,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Compiles a model by AOTInductor, for the CPU, and compares it with PyTorch before the file gets its name.

    It runs without Python, or in Python by `load_aoti`. The file holds machine code: it runs on processors like this
    one, with this version of PyTorch, and is to be trusted as a program is.

    Args:
        model, branches, prefixes, assets, overwrite, tolerance: as of `export_onnx`.
        path: file, .pt2.

    Raises:
        ValueError: there is no C++ compiler, branches or prefixes that the model does not have, or a name that does not
            end in .pt2 or is taken.
        ExportMismatch: the package would not compute what PyTorch computes.
    """
    from torch._inductor import aoti_compile_and_package, config  # takes a while to import

    path = check_target(path, suffix=".pt2", overwrite=overwrite)
    check_compiler()
    graph, told, texts = graph_with_texts(model, branches=branches, prefixes=prefixes, assets=assets)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "model.pt2"
        with quiet(), config.patch({"aot_inductor.metadata": texts}):
            aoti_compile_and_package(graph.program(), package_path=str(package))
        run = _load(package)
        verification = verify(graph, lambda inputs: run(*inputs), tolerance=tolerance)
        write_bytes(path, package.read_bytes())
    return Exported(path, told, verification, graph)


def check_compiler() -> None:
    """Refuses where AOTInductor has no C++ compiler to work with.

    Raises:
        ValueError: in words.
    """
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise ValueError(
            "format aoti needs a C++ compiler, and none was found; install g++ or clang++, or name one in CXX"
        ) from error


def load_aoti(path: str | Path) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, Any]]:
    """Loads a package of `export_aoti`. Its machine code runs: load only what you trust.

    Returns:
        A function of the inputs, in order, that returns the outputs, in order; and the file's description.

    Raises:
        ValueError: no such file, or it is no such package.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        run = _load(path)
    except Exception as error:  # what torch raises depends on what is wrong
        raise ValueError(f"{path} is not a package of AOTInductor that runs here: {error}") from error
    return run, read_description(run.get_metadata().get(KEY), where=str(path))


def _load(path: Path) -> Any:
    from torch._inductor import aoti_load_package

    with quiet():
        return aoti_load_package(str(path))
