"""Continual learning: figures against hand-computed ones, splits and memories that lose nothing, and runs that are pure
functions of their seed, also where they were interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from paradepth import continual
from paradepth.cli import main
from paradepth.continual import (
    SCENARIOS,
    STRATEGIES,
    ContinualOptions,
    balanced,
    continual_metrics,
    continual_run,
    load_scenario,
    reservoir,
    resume_continual,
    split_classes,
)
from paradepth.continual import learner as learner_module
from paradepth.continual.run import _check
from paradepth.continual.scenario import domains
from paradepth.continual.task import MixedBatches, TaskClassifier
from paradepth.data import Batches, ImageSplit, load_images
from paradepth.data.images import ImageData
from paradepth.models import ImageClassifierConfig, from_pretrained
from paradepth.studies import continual as continual_study
from paradepth.studies.record import measured, read_run
from paradepth.studies.study import Cell, Study, train_command
from paradepth.train import Config, Interrupted
from paradepth.train.use import evaluate_run

# ---- figures ---------------------------------------------------------------------------------------------------


def test_figures_of_a_sequence_are_those_computed_by_hand() -> None:
    matrix = [[0.9, None, None], [0.7, 0.8, None], [0.4, 0.9, 0.6]]
    found = continual_metrics(matrix)
    assert found.average_accuracy == pytest.approx((0.4 + 0.9 + 0.6) / 3)
    assert found.incremental_accuracy == pytest.approx((0.9 + (0.7 + 0.8) / 2 + (0.4 + 0.9 + 0.6) / 3) / 3)
    assert found.learning_accuracy == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.4) + (0.8 - 0.9)) / 2)
    assert found.backward_transfer == pytest.approx(((0.4 - 0.9) + (0.9 - 0.8)) / 2)
    assert found.forward_transfer is None


def test_forward_transfer_and_the_best_there_ever_was() -> None:
    # Task 2 was best before it was learned: forgetting counts from there, backward transfer from when it was learned.
    matrix = [[0.9, 0.7, 0.1], [0.95, 0.6, 0.3], [0.5, 0.5, 0.8]]
    found = continual_metrics(matrix, untrained=[0.1, 0.2, 0.15])
    assert found.forward_transfer == pytest.approx(((0.7 - 0.2) + (0.3 - 0.15)) / 2)
    assert found.forgetting == pytest.approx(((0.95 - 0.5) + (0.7 - 0.5)) / 2)
    assert found.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.5 - 0.6)) / 2)


@pytest.mark.parametrize("matrix", [[[0.5]], [[0.5, 0.5], [0.5]], [[0.5, None], [None, 0.5]]])
def test_matrices_that_are_none_are_refused(matrix: Any) -> None:
    with pytest.raises(ValueError, match=r"square|missing"):
        continual_metrics(matrix)


# ---- tasks -----------------------------------------------------------------------------------------------------


def images(classes: int, each: int = 6) -> ImageData:
    """Images whose pixels say what they are: their class, and their number within it."""

    def split(offset: int) -> ImageSplit:
        labels = torch.arange(classes).repeat_interleave(each)
        numbers = torch.arange(each).repeat(classes) + offset
        pixels = torch.stack([labels, numbers], dim=1).to(torch.uint8)
        return ImageSplit(pixels[:, None, :, None].expand(-1, 1, 2, 2).contiguous(), labels)

    names = tuple(f"class {i}" for i in range(classes))
    return ImageData("made", names, split(0), split(100), split(200), (0.5,), (0.5,))


@given(count=st.integers(2, 5), size=st.integers(2, 4), seed=st.integers(0, 2**31 - 1))
def test_every_class_and_every_sample_is_in_one_task(count: int, size: int, seed: int) -> None:
    data = images(count * size)
    scenario = split_classes(data, count, setting="class", seed=seed)
    assert sorted(scenario.class_names) == sorted(data.class_names)
    assert [number for task in scenario.tasks for number in task.classes] == list(range(count * size))
    assert scenario.class_names == split_classes(data, count, setting="task", seed=seed).class_names
    for name in ("train", "validation", "test"):
        seen = []
        for task in scenario.tasks:
            own = getattr(task.data, name)
            assert set(own.labels_N.tolist()) == set(task.classes)
            for pixels, label in zip(own.images_NCHW, own.labels_N.tolist(), strict=True):
                assert scenario.class_names[label] == data.class_names[int(pixels[0, 0, 0])]
                seen.append(tuple(pixels[0, :, 0].tolist()))
        assert sorted(seen) == sorted(tuple(p[0, :, 0].tolist()) for p in getattr(data, name).images_NCHW)


def test_the_order_of_classes_depends_on_the_seed() -> None:
    orders = {split_classes(images(10), 5, setting="class", seed=seed).class_names for seed in range(8)}
    assert len(orders) == 8


@pytest.mark.parametrize("count", [1, 3, 10])
def test_classes_that_make_no_equal_tasks_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        split_classes(images(10), count, setting="class", seed=0)


def test_domains_share_their_outputs_and_their_shapes() -> None:
    scenario = domains([images(4), images(4, each=3)])
    assert [task.classes for task in scenario.tasks] == [range(4), range(4)]
    assert scenario.seen(0) == scenario.seen(1) == 4
    with pytest.raises(ValueError, match="num_classes"):
        domains([images(4), images(5)])
    with pytest.raises(ValueError, match="no sequence"):
        domains([images(4)])


@pytest.mark.parametrize(
    ("name", "setting"), [("split_letters", "class"), ("split_digits", "domain"), ("split_digits", "x")]
)
def test_unknown_scenarios_and_settings_are_refused(name: str, setting: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown scenario|setting is"):
        load_scenario(name, setting, seed=0)


# ---- memories --------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    capacity=st.integers(0, 30),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_balanced_memory_keeps_what_it_had_or_what_is_new(sizes: list[int], capacity: int, seed: int) -> None:
    labels = [torch.arange(2).repeat(size) + 2 * task for task, size in enumerate(sizes)]
    before: list[set[int]] = []
    for count in range(1, len(labels) + 1):
        kept = balanced(labels[:count], capacity, seed=seed)
        assert sum(len(own) for own in kept) <= capacity
        numbers = [
            int((labels[task][own] == label).sum())
            for task, own in enumerate(kept)
            for label in labels[task].unique().tolist()
        ]
        share = capacity // (2 * count)
        assert all(min(share, sizes[i // 2]) <= n <= min(share + 1, sizes[i // 2]) for i, n in enumerate(numbers))
        for old, new in zip(before, kept, strict=False):
            assert set(new.tolist()) <= old
        before = [set(own.tolist()) for own in kept]


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), capacity=st.integers(0, 30), seed=st.integers(0, 99))
def test_a_reservoir_keeps_what_it_had_or_what_is_new(sizes: list[int], capacity: int, seed: int) -> None:
    before: list[set[int]] = []
    for count in range(1, len(sizes) + 1):
        kept = reservoir(sizes[:count], capacity, seed=seed)
        assert sum(len(own) for own in kept) == min(capacity, sum(sizes[:count]))
        for old, new in zip(before, kept, strict=False):
            assert set(new.tolist()) <= old
        before = [set(own.tolist()) for own in kept]


def test_a_reservoir_is_a_uniform_sample() -> None:
    counts = torch.zeros(2, 20)
    for seed in range(500):
        for task, own in enumerate(reservoir([20, 20], 8, seed=seed)):
            counts[task, own] += 1
    # 500 draws with probability 0.2: mean 100, deviation 9.
    assert counts.min() > 100 - 5 * 9
    assert counts.max() < 100 + 5 * 9


def test_half_of_a_batch_is_drawn_from_the_memory_by_seed_pass_and_index() -> None:
    data = images(4)
    memory = ImageSplit(data.test.images_NCHW[:5], data.test.labels_N[:5])
    batches = MixedBatches(Batches(data.train, batch_size=4, seed=1), memory, count=4, seed=1)
    pixels, labels = batches.get(2, 1)
    again, _ = batches.get(2, 1)
    assert torch.equal(pixels, again)
    assert (pixels[:4, 0, 1, 0] < 100).all()  # numbers of training samples
    assert (pixels[4:, 0, 1, 0] >= 200).all()  # those of the memory, each once
    assert len(set(pixels[4:, 0, 1, 0].tolist())) == 4
    assert len(labels) == 8
    assert not torch.equal(pixels[4:], batches.get(2, 2)[0][4:])


# ---- the model that is told the task ---------------------------------------------------------------------------


def test_other_tasks_classes_count_in_neither_loss_nor_choice() -> None:
    config = ImageClassifierConfig(
        image_size=(8, 8), patch_size=(4, 4), channels=1, width=16, heads=2, mlp=32, branches=2, depth=1, num_classes=6
    )
    model = TaskClassifier(config).double()
    x, targets = torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 5])
    block = torch.tensor([0, 0, 1, 1, 2, 2])
    allowed = block == block[targets][:, None]
    logits = model((x, allowed))
    plain = model.head(model.trunk(model.stem(x)))
    for i, target in enumerate(targets.tolist()):
        own = [c for c in range(6) if block[c] == block[target]]
        expected = F.cross_entropy(plain[i, own], torch.tensor(own.index(target)))
        assert torch.allclose(F.cross_entropy(logits[i], targets[i]), expected, rtol=0, atol=1e-12)
        assert int(logits[i].argmax()) in own
    F.cross_entropy(logits, targets).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.prefix_logits((x, allowed)).shape == (2, 4, 6)


# ---- runs ------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "model": "paraformer_nano",
    "branches": 1,
    "depth": 1,
    "width": 16,
    "mlp": 32,
    "patch_size": 4,
    "data": "digits",
    "budget": "160 layer_evals",
    "batch_size": 16,
    "learning_rate": 3e-3,
    "crop_padding": 1,
    "dropout": 0.1,
    "precision": "float32",
    "device": "cpu",
    "threads": 1,
}


def config_of(**options: Any) -> Config:
    return Config().replace(**{**TINY, **options})


def evaluation(run: Path) -> dict[str, Any]:
    found = json.loads((run / "evaluation.json").read_text())
    for task in found["tasks"]:
        task.pop("seconds")
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs_at_equal_compute(strategy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    setting = "task" if strategy in ("joint", "replay", "grow_replay") else "class"
    continual_run(config_of(), ContinualOptions(setting=setting, strategy=strategy), folder)
    found = evaluation(folder)
    tasks = found["tasks"]
    assert [len(task["classes"]) for task in tasks] == [2] * 5
    # An update more or less: growing rows pay for their frozen branches.
    assert all(abs(task["layer_evals"] - 160) <= 16 * 3 for task in tasks)
    grows = STRATEGIES[strategy].grows
    assert [task["branches"] for task in tasks] == ([1, 2, 3, 4, 5] if grows else [1] * 5)
    assert [task["memory"] > 0 for task in tasks] == [False, *[STRATEGIES[strategy].replays] * 4]
    assert [v is None for v in found["matrix"][1]] == [False, False, True, True, True]
    assert found["forward_transfer"] == [None]
    model = from_pretrained(folder)
    assert model.config.num_classes == 10
    assert type(model).__name__ == "ImageClassifier"


def test_what_a_grown_branch_learned_is_never_forgotten_where_the_task_is_known(tmp_path: Path) -> None:
    result = continual_run(config_of(), ContinualOptions(setting="task", strategy="grow"), tmp_path / "run")
    matrix = evaluation(tmp_path / "run")["matrix"]
    for task in range(5):
        assert len({matrix[i][task] for i in range(task, 5)}) == 1
    assert result["forgetting"] == result["backward_transfer"] == 0.0
    # And the first task's model is there, bit for bit, in all that came after it.
    alone = tmp_path / "alone"
    continual_run(config_of(), ContinualOptions(setting="task", strategy="finetune"), alone)
    assert evaluation(alone)["matrix"][0][0] == matrix[0][0]


def test_domains_have_forward_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paradepth.continual import run as run_module

    data = load_images("digits")
    monkeypatch.setattr(run_module, "load_scenario", lambda *_, **__: domains([data, data], name="clothes_digits"))
    options = ContinualOptions(scenario="clothes_digits", setting="domain", strategy="grow_replay", memory=50)
    result = continual_run(config_of(budget="2000 layer_evals"), options, tmp_path / "run")
    found = evaluation(tmp_path / "run")
    # The second domain is the first once more: what was learned is known of it before it is learned.
    assert found["matrix"][0][1] == found["matrix"][0][0]
    assert result["forward_transfer"] == found["matrix"][0][1] - found["untrained"][1]
    assert result["forward_transfer"] > 0.1


@pytest.mark.parametrize(("strategy", "setting"), [("grow_replay", "class"), ("grow", "task")])
def test_a_run_that_stopped_between_tasks_ends_as_one_that_did_not(
    strategy: Any, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ContinualOptions(setting=setting, strategy=strategy, policy="reservoir" if "replay" in strategy else None)
    continual_run(config_of(), options, tmp_path / "whole")
    learn = learner_module.Learner.learn

    def stops(self: Any, log: Any, stop: Any) -> str:
        if self.done == 2:
            log.write("train", step=self.step, layer_evals=0.0)  # of a task that is not finished
            raise Interrupted("stopped")
        return learn(self, log, stop)

    monkeypatch.setattr(learner_module.Learner, "learn", stops)
    with pytest.raises(Interrupted, match="the 2 before it are saved"):
        continual_run(config_of(), options, tmp_path / "cut")
    monkeypatch.setattr(learner_module.Learner, "learn", learn)
    assert main(["resume", str(tmp_path / "cut")]) == 0
    assert evaluation(tmp_path / "cut") == evaluation(tmp_path / "whole")
    weights, expected = (from_pretrained(tmp_path / name).state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "samples_per_second")}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("cut", "whole")
    ]
    assert [event for event in logs[0] if event["event"] != "resumed"] == logs[1]
    with pytest.raises(ValueError, match="is finished"):
        resume_continual(tmp_path / "cut")


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1)):
        continual_run(config_of(seed=seed), ContinualOptions(strategy="replay"), tmp_path / name)
    assert evaluation(tmp_path / "a") == evaluation(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"strategy": "grow"}, {"model": "vit_nano", "branches": None}, "serial stack"),
        ({"strategy": "sleep"}, {}, "strategy is 'sleep'"),
        ({"strategy": "finetune", "memory": 5}, {}, "means nothing to strategy"),
        ({"strategy": "replay", "memory": 0}, {}, "at least 1"),
        ({"strategy": "replay", "policy": "best"}, {}, "policy is 'best'"),
        ({"strategy": "replay", "new_depth": 2}, {}, "means nothing to strategy"),
        ({}, {"schedule": "one_pass"}, "schedule is 'one_pass'"),
        ({}, {"validations": 3}, "validations is 3"),
        ({}, {"freeze": ("stem",)}, "freeze is"),
        ({}, {"budget": "much"}, "budget is 'much'"),
        ({}, {"model": "gpt_nano", "branches": None, "patch_size": None}, "not for images"),
        ({}, {"batch_size": 10**4}, "batch_size is 10000"),
    ],
)
def test_what_cannot_work_is_refused(
    options: dict[str, Any], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        continual_run(config_of(**config), ContinualOptions(**{"strategy": "grow_replay", **options}), tmp_path / "run")


# ---- the command -----------------------------------------------------------------------------------------------


WORDS = [
    *("--model", "paraformer_nano", "--branches", "1", "--depth", "1", "--width", "16", "--mlp", "32"),
    *("--batch-size", "16", "--precision", "float32", "--threads", "1", "--seed", "3"),
]


def test_the_command_stops_on_a_signal_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "paradepth"]
    words = ["continual", "split_digits", "--strategy", "grow", "--setting", "task", "--run-dir", str(run), *WORDS]
    process = subprocess.Popen([*command, *words, "--budget", "4000 layer_evals"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "before it are saved" in said
    done = subprocess.run([*command, "resume", str(run), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["forgetting"] == 0.0
    tested = evaluate_run(run)  # an ordinary run directory, of a model over all classes
    assert len(tested["accuracy"]) == 5
    assert main(["report", str(run)]) == 0
    assert "average accuracy" in (run / "report.html").read_text()


def test_the_command_refuses_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ([], "needs a scenario"),
        (["split_letters"], "unknown scenario"),
        (["split_digits", "--data", "mnist"], "data follows"),
        (["split_digits", "--strategy", "grow", "--model", "vit_nano"], "serial stack"),
    ):
        assert main(["continual", *words, *(["--run-dir", str(tmp_path / "run")] if words else [])]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# ---- the study -------------------------------------------------------------------------------------------------


def test_cells_of_the_study_are_runs_of_equal_budgets() -> None:
    study = continual_study.study()
    assert len(study.cells) == 5 * 6 * 3
    for cell in study.cells:
        own = {
            name: cell.options[name] for name in ("setting", "strategy", "memory", "new_depth") if name in cell.options
        }
        ContinualOptions(scenario=cell.recipe, **own)
        assert cell.recipe in SCENARIOS
        budgets = {c.options["budget"] for c in study.cells if c.group == cell.group}
        assert len(budgets) == 1


def test_commands_of_the_study_mean_what_its_cells_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Config, ContinualOptions]] = []
    monkeypatch.setattr(continual, "continual_run", lambda config, options, *_, **__: taken.append((config, options)))
    study = continual_study.study(seeds=(4,))
    cells = {(cell.recipe, cell.label): cell for cell in study.cells}.values()
    for cell in cells:
        words = train_command(cell, tmp_path / "run", data_dir=tmp_path)[3:]
        assert words[:2] == ["continual", cell.recipe]
        assert main(words) == 0
        config, options = taken.pop()
        _check(config)
        flat = {**config.flat(), **vars(options)}
        assert {name: flat[name] for name in cell.options} == cell.options
        assert (flat["scenario"], flat["seed"], flat["data"]) == (cell.recipe, 4, SCENARIOS[cell.recipe][0][0])


def test_a_cell_of_the_study_is_recorded(tmp_path: Path) -> None:
    cell = Cell("a", "g", "l", "split_digits", {"strategy": "replay"}, 0, command="continual")
    assert cell.options_hash != Cell("a", "g", "l", "split_digits", {"strategy": "replay"}, 0).options_hash
    continual_run(config_of(), ContinualOptions(strategy="replay"), tmp_path / "run")
    record = read_run(cell, tmp_path / "run")
    assert measured(record, "forgetting") == evaluation(tmp_path / "run")["forgetting"]
    assert record["accuracy"] == evaluation(tmp_path / "run")["average_accuracy"]
    assert len(record["curve"]) == 5
    with pytest.raises(ValueError, match="does not start from another"):
        Cell("b", "g", "l", "split_digits", {}, 0, after=cell, command="continual")
    Study("s", "t", "q", (cell,), lambda records: [])


def test_findings_say_whether_a_margin_exceeds_its_deviation() -> None:
    study = continual_study.study()
    base = {label: 0.2 + 0.1 * place for place, label in enumerate(continual_study.ROWS)}
    records = [
        {
            "name": cell.name,
            "group": cell.group,
            "label": cell.label,
            "seed": cell.seed,
            "accuracy": [base[cell.label] + 0.01 * cell.seed],
            "loss": [1.0],
            "parameters": 1000,
            "measures": {"forgetting": [0.1], "forward_transfer": [0.05 if "grey" in cell.group else None]},
        }
        for cell in study.cells
    ]
    texts = study.findings(records)
    assert len(texts) == 5
    assert "+40.00 ± 0.00 points, more than its sd, so it wins" in texts[0]
    assert "Forward transfer" in texts[4]
    assert "Forward transfer" not in texts[0]
    for record in records:
        if record["label"] == continual_study.GROWN:
            record["accuracy"] = [base[continual_study.FINETUNED] + (0.0, 0.03, -0.02)[record["seed"]]]
    assert "not more than its sd" in study.findings(records)[0]
