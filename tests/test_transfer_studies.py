"""The studies of transfer and of stability: rows are matched, cells run at a tiny size, findings are right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from paradepth.cli import main
from paradepth.models import create_model
from paradepth.recipes import get_recipe
from paradepth.studies import stability, transfer
from paradepth.studies.record import read_diverged, read_run
from paradepth.studies.study import Cell, Study, train_command
from paradepth.train.accounting import update_cost
from paradepth.train.config import Config, check_options
from paradepth.train.finetune import finetune_config
from paradepth.train.schedules import Objective
from paradepth.train.tasks import task_class


def model_of(config: Config, classes: int = 10) -> Any:
    m = config.model_options
    shape = {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.name != "model"}
    shape = {name: value for name, value in shape.items() if value is not None}
    size = config.data_options.image_size or 28
    return create_model(m.model, image_size=size, num_classes=classes, **shape)


def config_of(cell: Cell, source: Path | None = None) -> Config:
    start = get_recipe(cell.recipe) if cell.after is None else finetune_config(str(source), cell.recipe)
    config = start.replace(**cell.options)
    check_options(config)
    task_class(config)
    return config


def cost_of(model: Any) -> float:
    return update_cost(model, Objective(model.prefixes), model.parts()).layer_evals


# ---- transfer ------------------------------------------------------------------------------------------------------


def test_rows_of_transfer_are_one_network_and_spend_the_same(tmp_path: Path) -> None:
    study = transfer.study(seeds=(1,))
    assert len(study.cells) == 2 + 2 * 4 * 4 + 2 * 2
    sizes = set()
    for kind in transfer.SCRATCHES:
        pretraining = next(c for c in study.cells if (c.group, c.label) == (transfer.PRETRAINING, kind))
        model = model_of(config_of(pretraining).replace(channels=3))
        model.save_pretrained(tmp_path / kind)
        assert cost_of(model) == 8
        sizes.add(sum(p.numel() for p in model.parameters()))
        for cell in study.cells:
            if cell.group == transfer.PRETRAINING or not cell.label.startswith(f"{kind},"):
                continue
            config = config_of(cell, tmp_path / kind)
            assert sum(p.numel() for p in model_of(config).parameters()) == sum(p.numel() for p in model.parameters())
            d = config.data_options
            assert d.validation_fraction == config_of(pretraining).data_options.validation_fraction
            assert (d.image_size, d.channels, d.data) == (32, 3, transfer.SETS[cell.group.split(" of ")[1]])
            assert d.train_fraction == transfer.FRACTIONS[cell.group.split(" of ")[0]]
            evals = transfer.LAYER_EVALS
            spent = sum(evals.values()) if cell.label.endswith(transfer.LONG) else evals[transfer.TUNED]
            assert config.optimiser_options.budget == f"{spent} layer_evals"
            assert (cell.after is None) == (transfer.TUNED not in cell.label)
            if cell.after is not None:
                assert (cell.after.label, cell.after.seed) == (kind, cell.seed)
    assert len(sizes) == 1


def write_images(place: Path, name: str, *shape: int, label: str = "label") -> None:
    draws = np.random.default_rng(len(name))
    features = datasets.Features({"img": datasets.Image(), label: datasets.ClassLabel(names=["a", "b", "c"])})
    for split, count in (("train", 60), ("test", 9)):
        pictures = [Image.fromarray(pixels) for pixels in draws.integers(0, 256, (count, *shape), dtype=np.uint8)]
        rows = {"img": pictures, label: [i % 3 for i in range(count)]}
        (place / name).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / name / f"{split}.parquet")


def tiny(cell: Cell, **options: Any) -> Cell:
    small = {"budget": "2 steps", "batch_size": 4, "validations": 1, "precision": "float32", **options}
    after = None if cell.after is None else tiny(cell.after)
    return dataclasses.replace(cell, options={**cell.options, **small}, after=after)


def trained(cell: Cell, runs: Path, data: Path) -> int:
    return main(train_command(cell, runs / cell.name, data_dir=data)[3:])


def test_transfer_from_pretraining_to_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey images of 28 pixels on a network of colours and 32, with a fraction of the training split."""
    monkeypatch.setattr("paradepth.cli.train.with_report", lambda result, **options: {})
    write_images(tmp_path, "cifar100", 32, 32, 3, label="fine_label")
    write_images(tmp_path, "fashion_mnist", 28, 28)
    cells = {cell.name: cell for cell in transfer.study(seeds=(1,)).cells}
    names = ["fashion_mnist-10-pf-tuned-1", "fashion_mnist-10-pf-scratch-1", "fashion_mnist-10-serial-long-1"]
    chosen = [tiny(cells["pretraining-pf-1"]), *(tiny(cells[name]) for name in names)]
    for cell in chosen:
        assert trained(cell, tmp_path / "runs", tmp_path) == 0, cell.name
        record = read_run(cell, tmp_path / "runs" / cell.name)
        assert record["layers"] == 8
        assert len(record["accuracy"]) == (1 if "serial" in cell.name else 4)
        training = json.loads((tmp_path / "runs" / cell.name / "config.json").read_text())["training"]
        assert training["train_fraction"] == (1.0 if "pretraining" in cell.name else 0.1)
        assert (training["channels"], training["image_size"]) == (3, 32)


def record(cell: Cell, accuracy: float) -> dict[str, Any]:
    shown = {"name": cell.name, "group": cell.group, "label": cell.label, "seed": cell.seed, "loss": [1.0]}
    return shown | {"accuracy": [accuracy], "measures": {}}


def test_findings_of_transfer_say_what_helps_and_who_transfers_better() -> None:
    def reached(cell: Cell) -> float:
        base = {transfer.TUNED: 0.5, transfer.SCRATCH: 0.4, transfer.LONG: 0.45}
        how = cell.label.partition(", ")[2]
        value = base.get(how, 0.3) + (0.02 if cell.label.startswith(transfer.BRANCHES) else 0.0)
        if cell.group == "100 % of Fashion-MNIST":
            value = 0.8 if how == transfer.SCRATCH else 0.7
        return value + 0.001 * cell.seed

    study = transfer.study()
    texts = study.findings([record(cell, reached(cell)) for cell in study.cells])
    assert len(texts) == 1 + 2 * 4 + 2
    assert texts[0] == ("Accuracy on CIFAR-100 after pretraining: 32.10 ± 0.10 % (PF 4×2), 30.10 ± 0.10 % (serial).")
    assert texts[1] == (
        "1 % of CIFAR-10: PF 4×2 52.10 ± 0.10 %, from scratch 42.10 ± 0.10 %: pretraining helps; serial "
        "50.10 ± 0.10 %, from scratch 40.10 ± 0.10 %: pretraining helps. Branches transfer better, by 2.00 points; "
        "gained over training from scratch +10.00 (branches) and +10.00 (serial)."
    )
    assert texts[8] == (
        "100 % of Fashion-MNIST: PF 4×2 70.10 ± 0.10 %, from scratch 80.10 ± 0.10 %: pretraining harms; serial "
        "70.10 ± 0.10 %, from scratch 80.10 ± 0.10 %: pretraining harms. 0.00 points apart, within the spread; "
        "gained over training from scratch -10.00 (branches) and -10.00 (serial)."
    )
    assert texts[9].startswith(
        "10 % of CIFAR-10, the compute of pretraining and fine-tuning spent from scratch: PF 4×2"
    )
    assert "47.10 ± 0.10 %, fine-tuned 52.10 ± 0.10 %: pretraining is worth it" in texts[9]


# ---- stability -----------------------------------------------------------------------------------------------------


def stability_cell(study: Study, group: str, label: str, seed: int = 0) -> Cell:
    return next(c for c in study.cells if (c.group, c.label, c.seed) == (group, label, seed))


def test_rows_of_stability_differ_in_schedule_and_start_only() -> None:
    study = stability.study()
    assert len(study.cells) == 2 * 5 * 4 * 5
    assert study.may_diverge
    assert {cell.seed for cell in study.cells} == {0, 1, 2, 3, 4}
    sizes, starts = set(), set()
    for label in {cell.label for cell in study.cells}:
        configs = [config_of(stability_cell(study, group, label)) for group in stability.RATES]
        rates = [config.optimiser_options.learning_rate for config in configs]
        assert rates == list(stability.RATES.values())
        model, schedule = model_of(configs[0]), configs[0].schedule_options.schedule
        sizes.add((sum(p.numel() for p in model.parameters()), cost_of(model)))
        starts.add((bool(model.config.branches), schedule, model.config.init_weights, model.config.deep_init))
    assert len(sizes) == 1
    assert len(starts) == 20


def test_stability_cells_run_and_one_that_diverges_has_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("paradepth.cli.train.with_report", lambda result, **options: {})
    write_images(tmp_path, "fashion_mnist", 28, 28)
    study = stability.study()
    for label in ("cycle, zero output", "serial, √(log 2L)", "stagewise, truncated normal"):
        cell = tiny(stability_cell(study, "high rate", label))
        assert trained(cell, tmp_path / "runs", tmp_path) == 0, label
        assert read_run(cell, tmp_path / "runs" / cell.name)["layers"] == 8
        assert read_diverged(cell, tmp_path / "runs" / cell.name) is None
    cell = tiny(stability_cell(study, "high rate", "joint, default"), learning_rate=1e30, clip=0.0, budget="20 steps")
    assert trained(cell, tmp_path / "runs", tmp_path) == 1
    assert "lower learning_rate" in capsys.readouterr().err
    found = read_diverged(cell, tmp_path / "runs" / cell.name)
    assert found is not None
    assert 0 < found["diverged"] < 20
    assert found["layer_evals"] == 8 * 4 * found["diverged"]
    assert (found["label"], found["layers"]) == ("joint, default", 8)


def test_findings_of_stability_name_spread_and_failures() -> None:
    study = stability.study()

    def made(cell: Cell) -> dict[str, Any]:
        schedule, _, start = cell.label.partition(", ")
        wide = 0.02 if start == "truncated normal" else 0.01
        value = 0.8 + (wide if cell.seed == 1 else -wide if cell.seed == 2 else 0.0)
        if cell.group == "high rate" and start == "default" and schedule in ("joint", "serial"):
            if cell.seed == 3:
                shown = {"name": cell.name, "group": cell.group, "label": cell.label, "seed": cell.seed}
                return shown | {"diverged": 17, "layer_evals": 1.0}
            value = 0.1 if schedule == "serial" else value
        return record(cell, value)

    texts = study.findings([made(cell) for cell in study.cells])
    assert texts[0] == "Usual rate: 0 of 100 runs failed (diverged, or stayed below 50 %)."
    assert texts[1] == (
        "Usual rate, by initialisation, runs that did not fail: default 80.00 %, sd 0.71; truncated normal 80.00 %, "
        "sd 1.41; zero output 80.00 %, sd 0.71; √(log 2L) 80.00 %, sd 0.71."
    )
    assert texts[2].startswith("Usual rate, by schedule, runs that did not fail: serial 80.00 %, sd 0.94; joint")
    assert "least with serial, truncated normal (80.00 ± 1.41 %)" in texts[3]
    assert texts[4] == (
        "High rate: 6 of 100 runs failed (diverged, or stayed below 50 %): serial, default: seed 0 reached 10.00 %, "
        "seed 1 reached 10.00 %, seed 2 reached 10.00 %, seed 3 diverged at step 17, seed 4 reached 10.00 %; joint, "
        "default: seed 3 diverged at step 17."
    )
    everything = [dict(r, diverged=1) for r in map(made, study.cells)]
    texts = study.findings(everything)
    assert "default: every run failed" in texts[1]
    assert len(texts) == 6
