"""Options of a run that starts from a trained model: its shape is taken over, the rest suits fine-tuning."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from paradepth.data.labelled import LABELLED_NAMES
from paradepth.models import CausalLM, HFClassifier, TrunkModel, list_models, model_class
from paradepth.models.hf_classifier import is_hf_folder
from paradepth.models.pretrained import build_model, quantisation_of
from paradepth.models.quantised import check_learns
from paradepth.train.config import Config, ModelOptions
from paradepth.train.tasks import TASKS, Task

HF = "hf:"
_NOT_TAKEN = ("model", "patch_size", "deep_init", "init_weights")  # of a source's shape
_GENERIC = {"sequence_classifier": "text_classifier_nano"}  # by type of model: the shape that all options replace

_COMMON: dict[str, Any] = {
    "budget": "3 epochs",
    "batch_size": 32,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "clip": 1.0,
    "validations": 6,
    "validation_fraction": 0.05,
}
# Small sets take more passes; validation is held out of them, too.
_SMALL = {"budget": "8 epochs", "validation_fraction": 0.1}
_BY_TASK: dict[str, dict[str, Any]] = {"cola": _SMALL, "mrpc": _SMALL, "rte": _SMALL, "labelled": _SMALL}


def _defaults(task: str) -> dict[str, Any]:
    return {**_COMMON, **_BY_TASK.get(task, {})}


def finetune_config(source: str | Path, task: str) -> Config:
    """The options of a run that fine-tunes a trained model.

    Shape, step and buffers are the source's, and so is the tokeniser; the head is new. Rates are lower than in training
    from scratch, and the head's is higher than the others.

    Args:
        source: a run directory or a saved model; or "hf:FOLDER" or "hf:NAME", an encoder of the transformers library.
        task: data to fine-tune on, by name: labelled texts for a masked or causal language model, a classifier of texts
            or an encoder of transformers; otherwise data of the kind that the source was trained on.

    Raises:
        ValueError: no such source or task, or one that does not suit the other.

    >>> import paradepth, tempfile
    >>> model = paradepth.create_model("bert_nano", branches=2, depth=1, vocab_size=260, context=32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = finetune_config(model.save_pretrained(folder), "sst2")
    >>> m = config.model_options
    >>> m.model, m.branches, m.depth, m.width, m.context, config.optimiser_options.head_rate
    ('text_classifier_nano', 2, 1, 64, 32, 3.0)
    """
    fitting = [kind for kind in TASKS if task in kind.data_names]
    if not fitting:
        names = dict.fromkeys(name for kind in TASKS for name in kind.data_names)
        raise ValueError(f"unknown task {task!r}; known are {', '.join(names)}")
    start = Config(recipe=f"finetune_{task}")
    if str(source).startswith(HF):
        folder = _fetched(str(source).removeprefix(HF))
        return _for_transformers(start, folder, task, {"context": 128})
    folder = Path(source).expanduser()
    if is_hf_folder(folder):
        raise ValueError(f"{folder} is a model of the transformers library; write {HF}{folder}")
    model, name = _described(folder)
    kind = type(model)
    if kind is HFClassifier:
        return _for_transformers(start, folder, task, {"context": model.config.context, "pool": model.config.pool})
    chosen = next((k for k in fitting if k.model_class is kind), None) or _successor(kind, fitting, task)
    return start.replace(**_defaults(task), **_options(model, chosen, name), data=task, init=folder)


def _successor(kind: type[TrunkModel], fitting: list[type[Task]], task: str) -> type[Task]:
    """The task that goes on from a model of another kind."""
    if kind.model_type in ("masked_lm", "causal_lm") and task in LABELLED_NAMES:
        return next(k for k in fitting if k.model_class.model_type == "sequence_classifier")
    own = [name for k in TASKS if k.model_class is kind for name in k.data_names]
    more = [] if kind.model_type not in ("masked_lm", "causal_lm") else LABELLED_NAMES
    raise ValueError(
        f"a model of type {kind.model_type!r} cannot be fine-tuned on {task!r}, which is {fitting[0].kind}; it can on "
        f"{', '.join([*own, *more])}"
    )


def _options(model: TrunkModel, task: type[Task], name: str | None) -> dict[str, Any]:
    """The source's shape, that of the registered model `name` where it is one of the task, as options, and rates that
    suit its kind."""
    config = model.config
    mine = {f.name for f in fields(task.model_class.config_class)}
    shape = {
        f.name: getattr(config, f.name)
        for f in fields(ModelOptions)
        if f.name in mine and hasattr(config, f.name) and f.name not in _NOT_TAKEN
    }
    known = [n for n in list_models() if model_class(n) is task.model_class]
    shape["model"] = name if name in known else _GENERIC.get(task.model_class.model_type, known[0])
    text = task.model_class.model_type == "sequence_classifier"
    if isinstance(model, CausalLM) and text:
        shape |= {"causal": True, "pool": "last"}
    options: dict[str, Any] = {"learning_rate": 3e-4, "head_rate": 3.0}
    if text:
        shape["dropout"] = max(config.dropout, 0.1)
    if hasattr(config, "image_size"):
        for name in ("image_size", "patch_size"):
            height, width = getattr(config, name)
            if height != width:
                raise ValueError(f"the source's {name} is {height} × {width}; only square images can be fine-tuned on")
        shape["patch_size"] = config.patch_size[0]
        shape["model"] = name if name in known else "paraformer_nano" if config.branches else "vit_nano"
        options |= {"image_size": config.image_size[0], "channels": config.channels}
    return shape | options


def _for_transformers(start: Config, folder: Path, task: str, shape: dict[str, Any]) -> Config:
    if task not in LABELLED_NAMES:
        raise ValueError(f"an encoder of transformers is fine-tuned on labelled texts, and {task!r} is none")
    return start.replace(
        **_defaults(task),
        **shape,
        model="hf_classifier",
        learning_rate=5e-5,
        head_rate=10.0,
        data=task,
        init=folder,
    )


def _described(folder: Path) -> tuple[Any, str | None]:
    """The model that a folder describes, with fresh weights (quicker than reading them), and its registered name."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no finished run and no saved model: it has no {name}")
    try:
        described = json.loads((folder / "config.json").read_text())
        found = build_model(described), described.get("training", {}).get("model")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} does not describe a paradepth model: {error!r}") from error
    check_learns(quantisation_of(folder), str(folder))
    return found


def _fetched(place: str) -> Path:
    """The folder of an encoder, from the Hub if it is no folder here."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        if not is_hf_folder(folder):
            raise ValueError(f"{folder} has no config.json of a transformers model; a run is given without {HF}")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(place, allow_patterns=["*.json", "*.safetensors", "vocab.txt", "merges.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{place} is no folder, and cannot be fetched from the Hub: {reason}") from error
