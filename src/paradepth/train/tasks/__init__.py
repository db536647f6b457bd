"""Tasks: what differs between image classification and language modelling, one file each."""

from __future__ import annotations

from difflib import get_close_matches

from paradepth.train.config import Config
from paradepth.train.tasks.base import Task
from paradepth.train.tasks.images import ImageTask
from paradepth.train.tasks.language import LanguageTask

TASKS: tuple[type[Task], ...] = (ImageTask, LanguageTask)

__all__ = ["TASKS", "ImageTask", "LanguageTask", "Task", "load_data", "task_class"]


def task_class(config: Config) -> type[Task]:
    """The task of a run, which its data determine; options that mean nothing to it are refused.

    Raises:
        ValueError: unknown data, a model for other data, or options that do not apply.

    >>> task_class(Config().replace(model="gpt_nano", data="text")).__name__
    'LanguageTask'
    """
    name = config.data_options.data
    known = {data: task for task in TASKS for data in task.data_names}
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown data {name!r}{hint}. Known: {', '.join(known)}. For images of your own use data 'folder', for "
            "texts of your own data 'text', both with data_dir=PLACE"
        )
    known[name].check(config)
    return known[name]


def load_data(config: Config) -> Task:
    """The task of a run with its data, on the CPU.

    Raises:
        ValueError: also what `task_class` and the task's `load` refuse.
    """
    return task_class(config).load(config)
