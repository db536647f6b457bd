"""Training: loop, schedules, optimiser, checkpoints and the metrics log."""

from paradepth.train.config import Config
from paradepth.train.run import resume_run, start_run
from paradepth.train.trainer import Interrupted, NonFiniteLoss

__all__ = ["Config", "Interrupted", "NonFiniteLoss", "resume_run", "start_run"]
