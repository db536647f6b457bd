"""Making a trained model smaller: ways to shrink it, one file each, and plans that combine them."""

from paradepth.compress.magnitude import Magnitude
from paradepth.compress.prefix import Prefix
from paradepth.compress.step import (
    STEPS,
    CountStep,
    Plan,
    Step,
    apply_plan,
    check_plan,
    parse_plan,
    plan_text,
    register,
)
from paradepth.compress.tune import Distil, Tune
from paradepth.compress.workbench import Workbench

__all__ = [
    "STEPS",
    "CountStep",
    "Distil",
    "Magnitude",
    "Plan",
    "Prefix",
    "Step",
    "Tune",
    "Workbench",
    "apply_plan",
    "check_plan",
    "parse_plan",
    "plan_text",
    "register",
]
