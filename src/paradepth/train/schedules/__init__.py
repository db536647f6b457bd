"""Schedules: the order in which branches learn. One file each, behind one interface."""

from paradepth.train.schedules.base import Annealing, Objective, Schedule
from paradepth.train.schedules.build import SCHEDULES, build_schedule, register_schedule
from paradepth.train.schedules.cycle import Cycle
from paradepth.train.schedules.joint import Joint
from paradepth.train.schedules.one_pass import OnePass
from paradepth.train.schedules.stagewise import Stagewise

__all__ = [
    "SCHEDULES",
    "Annealing",
    "Cycle",
    "Joint",
    "Objective",
    "OnePass",
    "Schedule",
    "Stagewise",
    "build_schedule",
    "register_schedule",
]
