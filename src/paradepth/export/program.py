"""Models as programs of `torch.export`.

The file is a zip archive in PyTorch's pt2 format: the graph as JSON, weights and constants as their bare bytes, and
this package's description in `extra/`. It holds no pickle, and files that do are not loaded.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from paradepth.atomic import write_bytes
from paradepth.export.describe import KEY, graph_with_texts, read_description
from paradepth.export.files import Exported, check_target
from paradepth.export.quiet import quiet
from paradepth.export.verify import TOLERANCE, verify
from paradepth.models.base import TrunkModel

DESCRIPTION = f"{KEY}.json"


def export_program(
    model: TrunkModel,
    path: str | Path,
    *,
    branches: int | None = None,
    prefixes: bool = False,
    assets: str | Path | None = None,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a model as a program of `torch.export`, compared with PyTorch before it gets its name.

    The file is read by `load_program`, and by `torch.export.load` in any program with PyTorch, this package or not.

    Args:
        model, branches, prefixes, assets, overwrite, tolerance: as of `export_onnx`.
        path: file, .pt2.

    Raises:
        ValueError: branches or prefixes that the model does not have, or a name that does not end in .pt2 or is taken.
        ExportMismatch: the file would not compute what PyTorch computes.

    >>> import paradepth, tempfile
    >>> model = paradepth.create_model("gpt_nano", depth=1).eval()
    >>> tokens = torch.randint(256, (2, 7))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export_program(model, Path(folder) / "model.pt2")
    ...     run, description = load_program(done.path)
    >>> bool(torch.allclose(run(tokens)[0], model(tokens), atol=1e-5)), description["branches"]
    (True, 0)
    """
    path = check_target(path, suffix=".pt2", overwrite=overwrite)
    graph, told, texts = graph_with_texts(model, branches=branches, prefixes=prefixes, assets=assets, key=DESCRIPTION)
    program = graph.program()
    program.example_inputs = None  # they would be the only pickle in the file
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files=texts)
    run = _load(io.BytesIO(buffer.getvalue())).module()
    verification = verify(graph, lambda inputs: run(*inputs), tolerance=tolerance)
    write_bytes(path, buffer.getvalue())
    return Exported(path, told, verification, graph)


def load_program(path: str | Path) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, Any]]:
    """Loads a file of `export_program`.

    Returns:
        A function of the inputs, in order, that returns the outputs, in order; and the file's description.

    Raises:
        ValueError: no such file, a file of another kind, or one with pickled parts, which could run anything.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    told = read_description(_checked(path), where=str(path))
    try:
        return _load(path).module(), told
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _load(source: Path | io.BytesIO) -> ExportedProgram:
    with quiet():
        return torch.export.load(source)


def _checked(path: Path) -> str | None:
    """The description in a file, after a look at everything that `torch.export.load` would unpickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            parts = {name.split("/", 1)[-1]: name for name in names}
            if any(name.startswith("data/aotinductor/") for name in parts):
                raise ValueError("it is a package of AOTInductor; load it with load_aoti")
            if len(parts) < len(names):
                raise ValueError("it has two entries of one name")
            pickled = [name for name in parts if _is_pickled(name, archive, parts[name])]
            description = parts.get(f"extra/{DESCRIPTION}")
            content = None if description is None else archive.read(description).decode()
    except (zipfile.BadZipFile, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not a program of torch.export: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if pickled:
        raise ValueError(f"{path} has pickled parts ({pickled[0]}), which can run anything; it is not loaded")
    return content


def _is_pickled(name: str, archive: zipfile.ZipFile, full: str) -> bool:
    if name.startswith("data/sample_inputs/"):
        return archive.getinfo(full).file_size > 0
    if not name.startswith(("data/weights/", "data/constants/")):
        return False
    if name.endswith("_config.json"):
        return any(entry.get("use_pickle", True) for entry in json.loads(archive.read(full))["config"].values())
    return not name.split("/", 2)[2].startswith(("weight_", "tensor_"))
