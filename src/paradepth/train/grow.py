"""Growing a finished run: a new run of a larger model, which starts with the old one's weights and moments.

Shapes: N classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from paradepth.data.seeds import generator
from paradepth.models import TrunkModel, from_pretrained
from paradepth.models.pretrained import quantisation_of
from paradepth.models.quantised import check_learns
from paradepth.train.checkpoint import CheckpointStore
from paradepth.train.config import Config
from paradepth.train.run import begin_run, read_run_config
from paradepth.train.tasks import task_class

Old = Literal["frozen", "slowed", "free"]
_CHOSEN = ("freeze", "slow", "class_names", "init", "branches", "depth", "depths")  # by growing itself


def grow_run(
    run_dir: str | Path,
    out: str | Path,
    *,
    branches: int = 0,
    depth: int | None = None,
    classes: Sequence[str] = (),
    old: Old = "frozen",
    init: Literal["zero", "random"] = "zero",
    overwrite: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a run of a model with more branches or classes, which `resume_run` trains.

    The new run starts at step 0 with the weights of the old one's model.safetensors, and with the optimiser's moments
    of its last checkpoint for every parameter that it had. Its options are the old run's, with the schedule `joint`
    and what `old` says; `options` replaces any of them.

    Args:
        run_dir: a finished run; it is left alone.
        out: folder for the new run.
        branches: how many to add.
        depth: layers of each new branch; None: as many as the first one has.
        classes: names of classes to add, of images and labelled texts.
        old: what the old parts do. "frozen": stem, branches and head (of new classes all but their rows) do not learn,
            so that dropping what was added gives the old model back bit for bit. "slowed": stem and branches learn at
            `slow_rate` of the rate. "free": everything learns.
        init: of new branches, see `TrunkModel.grow`.
        overwrite: replace the run that is in `out`.
        options: training options by name, without their groups: budget, learning_rate, data, data_dir, schedule ….

    Returns:
        Run directory, branches, layers of each, classes, parameters and how many of them are new, and the number of
        parameters (tensors) whose moments were kept.

    Raises:
        ValueError: a run that is not finished, serial where branches are asked for, or quantised; classes that collide,
            or that are another task's; nothing to grow; options that do not go together; data that do not fit.
    """
    given = dict(options or {})
    source = Path(run_dir)
    config = read_run_config(source)
    _check(source, old, given, task_class(config))
    if classes and "class_names" not in task_class(config).own_options:
        raise ValueError(f"the classes of {task_class(config).kind} come from the data; they cannot be added by name")
    model: TrunkModel = from_pretrained(source)
    seed = int(given.get("seed", config.run_options.seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "growth", model.config.layers).initial_seed())
        grown = model.grow(branches, depth=depth, classes=classes, init=init)
    wanted = _options(config, model, grown, old, given)
    # Of other optimisers the moments mean something else.
    same = wanted.optimiser_options.optimiser == config.optimiser_options.optimiser
    moments = carried_moments(_moments(source), grown) if same else {}
    active = min(model.prefixes + 1, grown.prefixes)
    stage = {"active": active, "start": 0.0, "best": None, "waited": 0}
    result = begin_run(
        wanted,
        out,
        weights=grown.state_dict(),
        moments=moments,
        shape=grown.config,
        assets=source,
        schedule_state=stage if wanted.schedule_options.schedule == "stagewise" else None,
        overwrite=overwrite,
    )
    count = sum(p.numel() for p in model.parameters())
    return {
        **result,
        "branches": grown.config.branches,
        "depths": list(grown.config.branch_depths) if grown.config.branches else [],
        "classes": len(getattr(grown.config, "class_names", ())),
        "parameters_added": result["parameters"] - count,
        "moments_kept": len({key.rsplit(":", 1)[0] for key in moments}),
        "old": old,
    }


def _check(source: Path, old: str, given: Mapping[str, Any], task: Any) -> None:
    if old not in get_args(Old):
        raise ValueError(f"old is {old!r}; it must be one of {', '.join(get_args(Old))}")
    for name in _CHOSEN:
        if name in given:
            raise ValueError(f"{name} follows from what grows, and from what old parts do; leave it out")
    check_learns(quantisation_of(source), str(source))


def _options(config: Config, model: TrunkModel, grown: TrunkModel, old: Old, given: dict[str, Any]) -> Config:
    """The options of the new run."""
    shape = grown.config
    parts = list(model.parts())
    new_classes = getattr(shape, "num_classes", 0) > getattr(model.config, "num_classes", 0)
    head = f"head:{model.config.num_classes}" if new_classes else "head"
    wanted: dict[str, Any] = {
        "schedule": "joint",
        "init": None,
        "freeze": (*parts[:-1], head) if old == "frozen" else (),
        "slow": tuple(parts[:-1]) if old == "slowed" else (),
    }
    if old != "slowed":
        wanted["slow_rate"] = 0.1
        if "slow_rate" in given:
            raise ValueError(f"slow_rate is {given['slow_rate']}, and old parts are {old}, not slowed")
    if shape.branches:
        wanted |= {"branches": shape.branches, "depths": shape.depths}
        wanted["depth"] = None if shape.depths else shape.depth
    changed = given.get("data", config.data_options.data) != config.data_options.data
    if "class_names" in task_class(config).own_options and (new_classes or changed) and shape.class_names:
        wanted["class_names"] = shape.class_names
    if changed and hasattr(shape, "image_size"):
        wanted |= {"image_size": shape.image_size[0], "channels": shape.channels}
    result = config.replace(**wanted).replace(**given)
    if result.schedule_options.schedule == "cycle" and old == "frozen" and head == "head":
        raise ValueError("schedule 'cycle' trains every prefix by itself, and nothing in those of old branches learns")
    return result


def _moments(source: Path) -> dict[str, Tensor]:
    """The optimiser's moments in a run's newest checkpoint; none where there is no checkpoint."""
    checkpoint = CheckpointStore(source / "checkpoints").latest()
    if checkpoint is None:
        return {}
    prefix = "optimiser/"
    return {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}


def carried_moments(moments: Mapping[str, Tensor], grown: TrunkModel) -> dict[str, Tensor]:
    """The moments that fit a grown model: of a parameter that has new rows (a head's new classes) these start with a
    first moment of 0 and a second one that is the mean of the old rows'.

    >>> from paradepth import create_model
    >>> model = create_model("paraformer_nano", width=4, heads=1, num_classes=3)
    >>> moments = {"head.classify.bias:exp_avg": torch.ones(2), "head.classify.bias:exp_avg_sq": torch.ones(2)}
    >>> [m.tolist() for m in carried_moments(moments, model).values()]
    [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    shapes = {name: parameter.shape for name, parameter in grown.named_parameters()}
    carried = {}
    for key, value in moments.items():
        name, moment = key.rsplit(":", 1)
        shape = shapes.get(name)
        if shape is None or (value.dim() and value.shape[1:] != shape[1:]):
            continue
        missing = shape[0] - len(value) if value.dim() else 0
        if missing > 0:
            mean = value.mean(dim=0, keepdim=True).expand(missing, *value.shape[1:])
            value = torch.cat([value, mean if moment == "exp_avg_sq" else torch.zeros_like(mean)])
        carried[key] = value
    return carried
