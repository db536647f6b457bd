"""What an exported file says of itself: task, classes, what to do with an image or a text before it goes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paradepth.export.graph import Graph, build_graph
from paradepth.models.base import TrunkModel
from paradepth.models.pretrained import config_dict

FORMAT_VERSION = 1
KEY = "paradepth"  # of the description, as JSON, among a file's metadata
ASSETS = {  # files of a run that a kind of model needs to be used
    "causal_lm": "tokenizer.json",
    "masked_lm": "tokenizer.json",
    "sequence_classifier": "tokenizer.json",
    "hf_classifier": "tokenizer.json",
    "translator": "tokenizer.json",
    "tagger": "words.json",
}
_TASKS = {
    "image_classifier": "classify an image",
    "causal_lm": "logits of the token after each",
    "masked_lm": "logits of the token at each place",
    "sequence_classifier": "classify a text or a pair of texts",
    "hf_classifier": "classify a text or a pair of texts",
    "tagger": "label every word",
    "translator": "logits of the target token after each, of a source and a target",
}


def describe(graph: Graph, *, assets: dict[str, str]) -> dict[str, Any]:
    """The description of a graph.

    Args:
        graph: what is exported.
        assets: files that come with it, by name.

    >>> import paradepth
    >>> from paradepth.export.graph import build_graph
    >>> model = paradepth.create_model("vit_nano", image_size=8, patch_size=4, depth=1)
    >>> told = describe(build_graph(model), assets={})
    >>> told["task"], told["preprocessing"]["image_size"], told["outputs"]
    ('classify an image', [8, 8], ['logits'])
    """
    model = graph.model
    config = model.config
    return {
        "format_version": FORMAT_VERSION,
        **config_dict(model),
        "task": _TASKS[model.model_type],
        "branches": config.branches,
        "prefixes": graph.module.prefixes,
        "inputs": [spec.described() for spec in graph.inputs],
        "outputs": list(graph.outputs),
        "classes": list(getattr(config, "class_names", ())),
        "preprocessing": _preprocessing(model),
        "assets": sorted(assets),
    }


def graph_with_texts(
    model: TrunkModel, *, branches: int | None, prefixes: bool, assets: str | Path | None, key: str = KEY
) -> tuple[Graph, dict[str, Any], dict[str, str]]:
    """What an exporter writes: the graph, its description, and the texts that go into the file, by name.

    Args:
        model, branches, prefixes: as of `build_graph`.
        assets: a folder with the files that the model needs to be used.
        key: name of the description among the texts.

    Raises:
        ValueError: what `build_graph` refuses, or a file that cannot be read.
    """
    graph = build_graph(model, branches=branches, prefixes=prefixes)
    found = read_assets(model.model_type, assets)
    told = describe(graph, assets=found)
    return graph, told, {key: json.dumps(told, ensure_ascii=False), **found}


def _preprocessing(model: Any) -> dict[str, Any]:
    c = model.config
    if model.model_type == "image_classifier":
        return {
            "image_size": list(c.image_size),
            "channels": c.channels,
            "resize": "bilinear",
            "pixels": "divided by 255, so from 0 to 1; the file subtracts the mean and divides by std itself",
            "mean": model.stem.pixel_mean.tolist(),
            "std": model.stem.pixel_std.tolist(),
        }
    told: dict[str, Any] = {"context": c.context, "pad": getattr(c, "pad", None)}
    told["words" if model.model_type == "tagger" else "tokenizer"] = ASSETS[model.model_type]
    return told


def read_assets(model_type: str, folder: str | Path | None) -> dict[str, str]:
    """The content of the files that a kind of model needs to be used, by name; none where the folder has none.

    Raises:
        ValueError: a file that cannot be read.
    """
    name = ASSETS.get(model_type)
    if folder is None or name is None or not (Path(folder) / name).is_file():
        return {}
    path = Path(folder) / name
    try:
        return {name: path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_description(content: str | None, *, where: str) -> dict[str, Any]:
    """The description in a file's metadata.

    Args:
        content: JSON; None where there is none.
        where: the file, for messages.

    Raises:
        ValueError: there is none, it is damaged, or of a version that this paradepth does not read.
    """
    if content is None:
        raise ValueError(f"{where} was not exported by paradepth: it does not say what to do with images or texts")
    try:
        told = json.loads(content)
        version, _ = told["format_version"], (told["model_type"], told["model"], told["inputs"], told["outputs"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: its description is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{where} has format version {version}; this paradepth reads {FORMAT_VERSION}")
    return told
