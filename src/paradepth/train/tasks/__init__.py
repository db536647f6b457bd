"""Tasks: what differs between image classification, language modelling and the like, one file each."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from paradepth.models import model_class
from paradepth.train.config import Config
from paradepth.train.tasks.base import Task
from paradepth.train.tasks.classify import ClassifyTask, HFClassifyTask
from paradepth.train.tasks.images import ImageTask
from paradepth.train.tasks.language import LanguageTask
from paradepth.train.tasks.masked import MaskedTask
from paradepth.train.tasks.sequences import SequenceTask
from paradepth.train.tasks.tagging import TaggingTask
from paradepth.train.tasks.translation import TranslationTask

TASKS: list[type[Task]] = [
    ImageTask,
    LanguageTask,
    SequenceTask,
    MaskedTask,
    ClassifyTask,
    HFClassifyTask,
    TaggingTask,
    TranslationTask,
]
"""All tasks."""

_T = TypeVar("_T", bound=type[Task])

__all__ = [
    "TASKS",
    "ClassifyTask",
    "HFClassifyTask",
    "ImageTask",
    "LanguageTask",
    "MaskedTask",
    "SequenceTask",
    "TaggingTask",
    "Task",
    "TranslationTask",
    "load_data",
    "register_task",
    "task_class",
]


def register_task(cls: _T) -> _T:
    """Class decorator: makes a task of your own known by its `data_names`, to training and the command line. Where
    another task has data of the same name, the model decides between them.

    Raises:
        ValueError: there is a task for these data and this class of models already.
    """
    for other in TASKS:
        both = set(other.data_names) & set(cls.data_names)
        if both and other.model_class is cls.model_class:
            raise ValueError(
                f"{other.__name__} is for data {sorted(both)[0]!r} and {cls.model_class.__name__} already; "
                "give the data of this task other names"
            )
    TASKS.append(cls)
    return cls


def task_class(config: Config) -> type[Task]:
    """The task of a run, which its data determine; options that mean nothing to it are refused.

    Raises:
        ValueError: unknown data, a model for other data, or options that do not apply.

    >>> task_class(Config().replace(model="gpt_nano", data="text")).__name__
    'LanguageTask'
    """
    name = config.data_options.data
    known = {data for task in TASKS for data in task.data_names}
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        names = dict.fromkeys(data for task in TASKS for data in task.data_names)
        raise ValueError(
            f"unknown data {name!r}{hint}. Known: {', '.join(names)}. For images of your own use data 'folder', for "
            "texts of your own data 'text', both with data_dir=PLACE"
        )
    fitting = [task for task in TASKS if name in task.data_names]
    model = model_class(config.model_options.model)  # a text may be for a causal or for a masked language model
    chosen = next((task for task in fitting if task.model_class is model), fitting[0])
    chosen.check(config)
    return chosen


def load_data(config: Config, *, assets: Path | None = None) -> Task:
    """The task of a run with its data, on the CPU.

    Args:
        config: all options.
        assets: a run directory whose tokeniser and the like are used instead of making new ones from the data.

    Raises:
        ValueError: also what `task_class` and the task's `load` refuse.
    """
    return task_class(config).load(config, assets=assets)
