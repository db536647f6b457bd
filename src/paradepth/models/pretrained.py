"""Saving and loading: a folder with `config.json` and `model.safetensors`, no pickle and no code."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from paradepth.atomic import write_bytes, write_json
from paradepth.models.packed import pack, unpack
from paradepth.models.quantised import load_quantised, stored_tensors

_MODEL_TYPES: dict[str, Any] = {}


def register_model_type(name: str) -> Callable[[type], type]:
    """Class decorator: makes `from_pretrained` build this class for configurations whose `model_type` is `name`.

    Raises:
        ValueError: when it is applied, if there is another class of that name.
    """

    def add(cls: type) -> type:
        if name in _MODEL_TYPES:
            raise ValueError(f"there is a model type {name!r} already; take another name")
        _MODEL_TYPES[name] = cls
        return cls

    return add


def config_dict(model: Any) -> dict[str, Any]:
    """What `config.json` holds for `model`: version, model type, the model's options, and how it is quantised if it
    is."""
    from paradepth import __version__

    told = {"paradepth": __version__, "model_type": model.model_type, "model": dataclasses.asdict(model.config)}
    if model.quantisation is not None:
        told["quantisation"] = model.quantisation.entry()
    return told


def build_model(config: dict[str, Any]) -> Any:
    """The model that the content of a `config.json` describes, with fresh weights.

    Raises:
        ValueError: no or unknown `model_type`, or bad options.
    """
    return _class(config).from_config(config["model"])


def read_config(config: dict[str, Any]) -> Any:
    """The shape that the content of a `config.json` describes.

    Raises:
        ValueError: no or unknown `model_type`, or bad options.
    """
    return _class(config).read_config(config["model"])


def _class(config: dict[str, Any]) -> Any:
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}; known are {sorted(_MODEL_TYPES)}")
    return _MODEL_TYPES[kind]


def save_pretrained(model: Any, path: str | Path, *, extra: dict[str, Any] | None = None, packed: bool = False) -> Path:
    """Writes `config.json` and `model.safetensors` into the folder `path`, each atomically.

    Args:
        model: a paradepth model; a quantised one is stored as integers and scales.
        path: folder, made if missing.
        extra: further entries of `config.json`; `from_pretrained` ignores them.
        packed: store tensors that become smaller by it without their zeros, for pruned models. Nothing is lost.

    Returns:
        The folder.

    Raises:
        ValueError: a model whose trunk is shared between processes.
    """
    model.check_whole()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    told = {**config_dict(model), **(extra or {})}
    if model.quantisation is None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    else:
        tensors = stored_tensors(model)
    if packed:
        tensors, shapes = pack(tensors)
        told |= {"packed": shapes} if shapes else {}
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", told)
    return folder


def from_pretrained(path: str | Path, *, hub: bool = False, revision: str | None = None) -> Any:
    """Loads a model saved by `save_pretrained`, or the model of a run directory.

    Nothing is fetched unless `hub` is true.

    Args:
        path: a folder; with `hub`, the name of a Hub repository ("user/name").
        hub: download `config.json` and `model.safetensors` from the Hugging Face Hub (or take them from its local
            cache).
        revision: branch, tag or commit on the Hub.

    Returns:
        The model in evaluation mode, on the CPU, with the dtype in which it was saved; a quantised one as it was.

    Raises:
        ValueError: nothing there, damaged or incomplete files, weights that do not fit the configuration, or a
            quantised model where torchao is not installed.

    >>> import paradepth, tempfile, torch
    >>> model = paradepth.create_model("vit_nano", image_size=8, patch_size=4, depth=1).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = paradepth.from_pretrained(model.save_pretrained(folder))
    >>> images = torch.rand(1, 3, 8, 8)
    >>> bool(torch.equal(model(images), again(images)))
    True
    """
    if hub:
        from huggingface_hub import snapshot_download

        patterns = ["config.json", "model.safetensors"]
        folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    else:
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for Hub repositories; pass hub=True as well")
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; to fetch a Hub repository of that name pass hub=True")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; a saved model has config.json and model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged file: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{folder / 'config.json'} does not describe a paradepth model")
    model: nn.Module = build_model(config)
    try:
        if "packed" in config:
            tensors = unpack(tensors, config["packed"])
        if "quantisation" in config:
            load_quantised(model, tensors, config["quantisation"])
            return model.eval()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit the configuration: {error}") from error
    return model.eval()


def quantisation_of(folder: Path) -> dict[str, Any] | None:
    """How the model of a run or of a saved model is quantised: the entry of its `config.json`, None where there is
    none.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return described.get("quantisation") if isinstance(described, dict) else None


def push_to_hub(model: Any, repository: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads `config.json` and `model.safetensors` to a Hub repository, which is made if missing; returns its
    address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = api.create_repo(repository, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        api.upload_folder(repo_id=repository, folder_path=save_pretrained(model, folder))
    return str(address)
