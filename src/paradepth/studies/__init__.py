"""Studies: one file per question; a grid of cells, resumable, then a report of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

from paradepth.studies import (
    approximation,
    balance,
    branch_sum,
    closed_form,
    continual,
    finetune_glue,
    gated,
    indicator,
    mixing_overhead,
    relaxation,
    schedules,
    sharing,
    stability,
    stagewise,
    tasks,
    transfer,
)
from paradepth.studies.study import Size, Study

STUDIES: dict[str, Callable[[Size], Study]] = {
    "schedules": schedules.study,
    "stagewise": stagewise.study,
    "tasks": tasks.study,
    "finetune_glue": finetune_glue.study,
    "continual": continual.study,
    "transfer": transfer.study,
    "stability": stability.study,
    "indicator": indicator.study,
    "approximation": approximation.study,
    "balance": balance.study,
    "closed_form": closed_form.study,
    "gated": gated.study,
    "sharing": sharing.study,
    "branch_sum": branch_sum.study,
    "relaxation": relaxation.study,
    "mixing_overhead": mixing_overhead.study,
}


def get_study(name: str, size: Size = "here") -> Study:
    """The study called `name`.

    Args:
        name: its name.
        size: "smoke" takes seconds and tests that the study runs; "here" is what is committed, hours of two cores;
            "paper" has the papers' sizes and data.

    Raises:
        ValueError: unknown study or size.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; known are {', '.join(sorted(STUDIES))}")
    if size not in get_args(Size):
        raise ValueError(f"size is {size!r}, but must be one of {', '.join(get_args(Size))}")
    return replace(STUDIES[name](size), size=size)
