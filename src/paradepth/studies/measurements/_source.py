"""The finished run that a measurement starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paradepth.models import TrunkModel, from_pretrained
from paradepth.train.config import Config
from paradepth.train.run import read_run_config
from paradepth.train.tasks import Task, load_data


@dataclass(frozen=True)
class Source:
    """A finished run with its data.

    Attributes:
        run: its folder.
        task: with its data and its options.
    """

    run: Path
    task: Task

    @classmethod
    def read(cls, run: Path | None, *, data_dir: Path | None, seed: int | None = None, **options: Any) -> Source:
        """The run that a cell was given.

        Args:
            run: as given.
            data_dir: where the data lies now; None takes the place that was used in training.
            seed: of the cell, which has to be the run's; None: any.
            options: of the run, which are to be others now.

        Raises:
            ValueError: no run, one of another seed, or no data.
        """
        if run is None:
            raise ValueError("this measures a finished run, and there is none; give the cell one that it comes after")
        config = read_run_config(run)
        if seed is not None:
            check_seed(seed, config, run)
        if data_dir is not None:
            options["data_dir"] = data_dir
        return cls(run, load_data(config.replace(**options), assets=run))

    def trained(self) -> Any:
        """The run's model, in evaluation mode."""
        return from_pretrained(self.run)

    def initial(self) -> TrunkModel:
        """The model that the run began with, drawn again, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.task.config.run_options.seed)
            model = self.task.new_model()
        self.task.normalise(model)
        return model.eval()


def check_seed(seed: int, config: Config, run: Path) -> None:
    """Refuses a run of another seed than the cell's.

    Raises:
        ValueError: naming both.
    """
    if config.run_options.seed != seed:
        raise ValueError(f"seed is {seed}, and {run} was trained with {config.run_options.seed}")
