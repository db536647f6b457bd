"""The plans that are tried where the user names none."""

from __future__ import annotations

from collections.abc import Iterator

from paradepth.compress.step import Plan, check_plan, parse_plan
from paradepth.models import TrunkModel

TUNE_STEPS = 300
QUICK_STEPS = 100


def default_plans(
    model: TrunkModel, *, tune_steps: int = TUNE_STEPS, quick: bool = False
) -> tuple[list[Plan], dict[str, str]]:
    """Plans for a model: every way on its own, then combinations. A serial stack gets none that leaves branches.

    Args:
        model: the full model.
        tune_steps: updates of each recovery and of each distillation.
        quick: only the prefixes, one degree of pruning, and int8.

    Returns:
        The plans that fit the model, and the others with the reason why they do not.

    >>> import paradepth
    >>> from paradepth.compress import plan_text
    >>> plans, _ = default_plans(paradepth.create_model("paraformer_nano", branches=2), tune_steps=50, quick=True)
    >>> [plan_text(plan) for plan in plans]
    ['prefix=1', 'prefix=1+distil=50', 'prefix=1+distil=50+int8', 'magnitude=0.7', 'magnitude=0.7+tune=50', 'int8']
    """
    plans: list[Plan] = []
    left_out: dict[str, str] = {}
    for text in dict.fromkeys(_texts(model, tune_steps, quick)):
        try:
            plan = parse_plan(text)
            check_plan(plan, model)
        except ValueError as error:
            left_out[text] = str(error)
        else:
            if plan not in plans:
                plans.append(plan)
    return plans, left_out


def _texts(model: TrunkModel, steps: int, quick: bool) -> Iterator[str]:
    config = model.config
    lengths = _lengths(config.branches)
    tune, distil = f"tune={steps}", f"distil={steps}"
    if quick:
        for k in lengths:
            yield from _grown(f"prefix={k}", distil, "int8")
        yield from _grown("magnitude=0.7", tune)
        yield "int8"
        return
    for k in lengths:
        yield f"prefix={k}"
        yield f"subset={k}"
        yield f"merge={k}"
        yield from _grown(f"prefix={k}+{distil}", "int8")
    for part in (0.5, 0.7, 0.9):
        yield from _grown(f"magnitude={part}", tune)
    halves = [f"{name}={half}" for name, half in _halves(config).items()]
    for half in halves:
        yield from _grown(half, tune)
    yield from ("int8", "int8_dynamic", "int4")
    yield f"magnitude=0.7+{tune}+int8"
    for k in lengths[:2]:  # where the small models are
        yield from _grown(f"subset={k}", distil, "int8")
        yield from _grown(f"merge={k}", distil)
        yield from _grown(f"prefix={k}+{distil}", f"magnitude=0.5+{tune}", "int8")
        for half in halves[-1:]:  # neurons: most of the weights
            yield from _grown(f"prefix={k}+{half}", distil, "int8")


def _grown(first: str, *more: str) -> Iterator[str]:
    """The plan, and what it becomes step by step."""
    yield first
    for part in more:
        first = f"{first}+{part}"
        yield first


def _lengths(branches: int) -> list[int]:
    """Numbers of branches to leave: all below the full one, a few of them where there are many."""
    if branches <= 6:
        return list(range(1, branches))
    return sorted({1, 2, *(branches * part // 4 for part in (1, 2, 3))})


def _halves(config: object) -> dict[str, int]:
    """Half of the heads, and half of the neurons, where a model has them."""
    found = {"heads": getattr(config, "heads", 0) // 2, "neurons": getattr(config, "mlp", 0) // 2}
    return {name: half for name, half in found.items() if half}
