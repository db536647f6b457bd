"""Studies: one file per question; a grid of cells, resumable, then a report of its own."""

from __future__ import annotations

from collections.abc import Callable

from paradepth.studies import continual, finetune_glue, schedules, stability, stagewise, tasks, transfer
from paradepth.studies.study import Study

STUDIES: dict[str, Callable[[], Study]] = {
    "schedules": schedules.study,
    "stagewise": stagewise.study,
    "tasks": tasks.study,
    "finetune_glue": finetune_glue.study,
    "continual": continual.study,
    "transfer": transfer.study,
    "stability": stability.study,
}


def get_study(name: str) -> Study:
    """The study called `name`.

    Raises:
        ValueError: unknown study.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; known are {', '.join(sorted(STUDIES))}")
    return STUDIES[name]()
