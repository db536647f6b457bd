"""The studies `relaxation` and `mixing_overhead`: their grids, measurements and rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import paradepth
from paradepth.models import model_config
from paradepth.nn import EncoderLayer
from paradepth.nn.static_mixing import equal_shape
from paradepth.recipes import get_recipe
from paradepth.studies import get_study, mixing_overhead, relaxation
from paradepth.studies.measurements import mixing_overhead as overhead
from paradepth.studies.measurements.relaxation import measure as measure_relaxation
from paradepth.studies.study import Size
from paradepth.train import start_run
from paradepth.train.tasks import task_class
from runs import tiny_config

SIZES: tuple[Size, ...] = ("smoke", "here", "paper")


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_a_table_spend_the_same_and_have_the_same_parameters(size: Size) -> None:
    study = get_study("relaxation", size)
    rows: dict[tuple[str, str], list[tuple[Any, int]]] = {}
    for cell in study.cells:
        if cell.command == "measure" or cell.seed:
            continue
        config = get_recipe(cell.recipe).replace(**dict(cell.options))
        task = task_class(config)
        task.check(config)
        m = config.model_options
        given = {
            name: getattr(m, name) for name in ("branches", "depth", "width", "heads", "mlp", "mixing", "mixing_rank")
        }
        shape = model_config(m.model, **{k: v for k, v in given.items() if v is not None})
        tokens = relaxation._GROUPS[size][cell.group][2]
        layer = EncoderLayer(
            shape.width,
            heads=shape.heads,
            mlp=shape.mlp,
            mixing=shape.mixing,
            tokens=tokens,
            mixing_rank=shape.mixing_rank,
            causal=m.model.startswith("gpt"),
        )
        o = config.optimiser_options
        spent = (shape.layers, o.budget, o.batch_size, o.learning_rate, config.schedule_options.schedule)
        rows.setdefault((cell.group, cell.label.rpartition(", ")[0]), []).append(
            (spent, sum(p.numel() for p in layer.parameters()))
        )
    assert len(rows) >= len(relaxation._GROUPS[size])
    for pair in rows.values():
        (ours, size_of_ours), (theirs, size_of_theirs) = pair
        assert ours == theirs
        assert abs(size_of_ours - size_of_theirs) <= 0.01 * size_of_ours


def record(group: str, label: str, seed: int, accuracy: float) -> dict[str, Any]:
    return {
        "group": group,
        "label": label,
        "seed": seed,
        "accuracy": [0.1, accuracy],
        "loss": [1.0, 1.0],
        "measures": {"exact_accuracy": [0.0, accuracy / 2]},
    }


def after(label: str, seed: int, lost: float) -> dict[str, Any]:
    named = {"accuracy": 0.9, "lost_everywhere": lost, "lost_everywhere_mean": 0.3, "lost_everywhere_nothing": 0.5}
    lists = {"lost_by_layer": [lost / 2, lost], "lost_by_branch": [lost / 4, lost / 3]}
    return {"group": relaxation.AFTER, "label": label, "seed": seed, "measures": {**named, **lists}}


def made_up(**groups: tuple[float, float, float]) -> list[dict[str, Any]]:
    """Records of three seeds: of each group accuracy with attention, with static mixing, and what is lost after."""
    found = []
    for seed, shift in enumerate((-0.001, 0.0, 0.001)):
        for name, (ours, theirs, lost) in groups.items():
            group = name.replace("_", ", ")
            found.append(record(group, relaxation.ATTENTION, seed, ours + shift))
            found.append(record(group, relaxation.STATIC, seed, theirs + shift))
            found.append(after(group, seed, lost + shift))
    return found


def test_verdicts_follow_from_the_figures() -> None:
    def answers(records: list[dict[str, Any]]) -> list[str]:
        told = relaxation.verdicts(records)
        return [told[claim.name].verdict for claim in (relaxation.CLAIM, relaxation.QUESTION)]

    kept, lost = (0.9, 0.895, 0.2), (0.95, 0.6, 0.002)
    assert answers(made_up(pictures=kept)) == ["holds", "does not hold"]
    assert answers(made_up(pictures=kept, recall_4=lost)) == ["holds with conditions", "holds with conditions"]
    assert answers(made_up(recall_4=lost)) == ["does not hold", "holds"]
    assert answers(made_up(recall_4=(0.5, 0.2, 0.1))) == ["could not be tested here", "could not be tested here"]
    told = relaxation.verdicts(made_up(pictures=kept, recall_4=lost, recall_9=(0.5, 0.4, 0.1)))
    figure = told[relaxation.CLAIM.name].figure
    assert "kept: pictures 0.5; lost: recall, 4 35.0" in figure
    assert "does not learn recall, 9" in figure
    texts = " ".join(relaxation.findings(made_up(pictures=kept, recall_4=lost)))
    assert "recall, 4: 95.00 ± 0.10 % with attention, 60.00 ± 0.10 % with static mixing" in texts
    assert "most in layer 2 of 2" in texts
    assert "without a mistake, in %, with attention and with static mixing: recall, 4 47.5 and 30.0." in texts


def overheads(**rows: tuple[float, float]) -> list[dict[str, Any]]:
    found = []
    for shift in (-0.01, 0.0, 0.01):
        for label, (step, saved) in rows.items():
            measures = {"step_ratio": step + shift, "saved_ratio": saved, "forward_ratio": step + shift}
            more = {"static_full_parameters": 10, "attention_parameters": 5, "full_step_ratio": 0.7}
            found.append({"group": mixing_overhead.GROUP, "label": label, "measures": {**measures, **more}})
    return found


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ({"a": (1.2, 1.5), "b": (1.1, 2.0)}, "holds"),
        ({"a": (1.2, 1.5), "b": (1.0, 2.0)}, "holds with conditions"),
        ({"a": (1.005, 1.0), "b": (0.8, 0.9)}, "does not hold"),
    ],
)
def test_overheads_are_judged_by_their_spread(rows: dict[str, tuple[float, float]], verdict: str) -> None:
    records = overheads(**rows)
    assert mixing_overhead.verdicts(records)[mixing_overhead.CLAIM.name].verdict == verdict
    assert "2.0 times the parameters" in mixing_overhead.findings(records)[-1]


def test_memory_is_that_of_what_is_kept_for_the_backward_pass() -> None:
    x = torch.randn(3, 5, 8)
    part = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    assert overhead._saved(part, x) == 4 * (3 * 5 * 16) * 2  # before and behind GELU; the input is not counted
    assert overhead._saved(nn.Linear(8, 4), x) == 0


def test_an_overhead_is_measured(tmp_path: Path) -> None:
    given: dict[str, Any] = {"seed": 0, "data_dir": None, "run_dir": tmp_path, "source": None}
    found = overhead.measure(**given, tokens=16, width=32, batch_tokens=64, rounds=2)
    assert abs(cast(float, found["attention_parameters"]) - cast(float, found["static_equal_parameters"])) <= 33
    assert found["static_full_parameters"] == found["attention_parameters"] - 2 * 32 * 33 + 16 * 16  # pyright: ignore
    assert cast(float, found["saved_ratio"]) > 0
    assert equal_shape(32, 1, 128, 2048)["mixing_rank"] == 1
    with pytest.raises(ValueError, match="multiple of 32"):
        overhead.measure(**given, tokens=16, width=40)
    with pytest.raises(ValueError, match="rounds is 0"):
        overhead.measure(**given, tokens=16, width=32, rounds=0)


def test_a_trained_model_is_measured_without_its_attention(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start_run(
        tiny_config(width=16, heads=2, mlp=32, branches=2, depth=1, patch_size=2, budget="30 steps", dropout=0.0), run
    )
    given: dict[str, Any] = {"seed": 0, "data_dir": None, "run_dir": tmp_path / "measure"}
    found = measure_relaxation(**given, source=run, samples=64, tested=150)
    assert len(cast(list, found["lost_by_layer"])) == len(cast(list, found["error_by_layer"])) == 2
    assert found["lost_by_layer"] == found["lost_by_branch"]
    model = paradepth.from_pretrained(run)
    assert model.config.mixing == "attention"
    assert 0 <= cast(float, found["accuracy"]) <= 1
    with pytest.raises(ValueError, match="give the cell one"):
        measure_relaxation(**given, source=None)
    with pytest.raises(ValueError, match="samples is 0"):
        measure_relaxation(**given, source=run, samples=0)
