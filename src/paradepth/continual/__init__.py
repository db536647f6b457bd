"""Continual learning: tasks that come one after another, strategies against forgetting, and how much is forgotten."""

from paradepth.continual.memory import balanced, reservoir
from paradepth.continual.metrics import ContinualMetrics, continual_metrics
from paradepth.continual.options import ContinualOptions
from paradepth.continual.run import continual_run, resume_continual
from paradepth.continual.scenario import SCENARIOS, Experience, Scenario, load_scenario, split_classes
from paradepth.continual.strategy import STRATEGIES, Strategy

__all__ = [
    "SCENARIOS",
    "STRATEGIES",
    "ContinualMetrics",
    "ContinualOptions",
    "Experience",
    "Scenario",
    "Strategy",
    "balanced",
    "continual_metrics",
    "continual_run",
    "load_scenario",
    "reservoir",
    "resume_continual",
    "split_classes",
]
