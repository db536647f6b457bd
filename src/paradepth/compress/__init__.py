"""Making a trained model smaller: ways to shrink it, one file each, and plans that combine them."""

from paradepth.compress.magnitude import Magnitude
from paradepth.compress.merge import Merge
from paradepth.compress.prefix import Prefix
from paradepth.compress.quantise import Int4, Int8, Int8Dynamic
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
from paradepth.compress.structured import Heads, Neurons
from paradepth.compress.subset import Subset
from paradepth.compress.to_branches import ToBranches, ToInterleavedBranches
from paradepth.compress.tune import Distil, Tune
from paradepth.compress.workbench import Workbench

__all__ = [
    "STEPS",
    "CountStep",
    "Distil",
    "Heads",
    "Int4",
    "Int8",
    "Int8Dynamic",
    "Magnitude",
    "Merge",
    "Neurons",
    "Plan",
    "Prefix",
    "Step",
    "Subset",
    "ToBranches",
    "ToInterleavedBranches",
    "Tune",
    "Workbench",
    "apply_plan",
    "check_plan",
    "parse_plan",
    "plan_text",
    "register",
]
