"""The training loop on real (small) runs: resuming, stopping, refusing, data parallel, compiling."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paradepth
from paradepth.distributed import World
from paradepth.train import Config, Interrupted, NonFiniteLoss, resume_run, start_run
from paradepth.train.config import check_options
from paradepth.train.optimiser import Optimiser
from paradepth.train.run import read_run_config
from paradepth.train.schedules import Annealing, Objective, build_schedule
from paradepth.train.trainer import Trainer
from runs import SCHEDULES, Stop, events, stop_at, tiny_config

HERE = Path(__file__).parent


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runs_killed_at_random_points_end_with_the_same_weights(schedule: str, tmp_path: Path) -> None:
    """Three kill points for each of six schedules: eighteen in all."""
    seed = str(list(SCHEDULES).index(schedule))
    command = [sys.executable, str(HERE / "kill_driver.py"), str(tmp_path), schedule, "3", seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["kills"]) >= 2, "the kills came too late to test anything"
    assert result["killed"] == result["whole"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains_and_leaves_a_complete_run(schedule: str, tmp_path: Path) -> None:
    result = start_run(tiny_config(schedule), tmp_path / "run")
    run = tmp_path / "run"
    names = {"config.json", "model.safetensors", "metrics.jsonl", "environment.json", "evaluation.json", "checkpoints"}
    assert {path.name for path in run.iterdir()} == names
    assert result["steps"] == 24
    assert len(result["accuracy"]) == 3
    model = paradepth.from_pretrained(run)
    assert model.prefixes == 3
    validations = events(run, "validation")
    assert [v["step"] for v in validations] == [4, 8, 12, 16, 20, 24]
    assert validations[-1]["layer_evals"] == result["layer_evals"]
    if schedule.startswith("stagewise"):
        assert [s["active"] for s in events(run, "stage")] == [1, 2, 3]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert sum(map(sum, evaluation["confusion"])) == evaluation["samples"] == 359
    correct = sum(evaluation["confusion"][i][i] for i in range(10))
    assert correct / 359 == pytest.approx(evaluation["accuracy"][-1])


def test_equal_budgets_in_layer_evaluations_are_spent_equally(tmp_path: Path) -> None:
    spent = {}
    for schedule in ("joint", "cycle", "one_pass", "stagewise"):
        config = tiny_config(schedule, budget="2000 layer_evals", dropout=0.0, validations=1)
        spent[schedule] = start_run(config, tmp_path / schedule)["layer_evals"]
    for schedule, evals in spent.items():
        largest_batch = 32 * (6 if schedule == "cycle" else 3)
        assert 2000 <= evals < 2000 + largest_batch


def test_an_epoch_of_the_cycle_is_two_passes(tmp_path: Path) -> None:
    once = start_run(tiny_config("one_pass", budget="1 epoch", validations=1), tmp_path / "a")
    cycle = start_run(tiny_config("cycle", budget="1 epoch", validations=1), tmp_path / "b")
    assert cycle["steps"] == 2 * once["steps"]
    assert cycle["layer_evals"] == 32 * once["steps"] * (1 + 2 + 3 + 3)


@pytest.mark.parametrize("optimiser", ["adamw", "muon", "sgd"])
def test_resume_is_exact_for_every_optimiser(optimiser: str, tmp_path: Path) -> None:
    config = tiny_config("one_pass", optimiser=optimiser, checkpoint_every=5)
    start_run(config, tmp_path / "whole")

    stop = stop_at(13)
    with pytest.raises(Stop):
        start_run(config, tmp_path / "cut", on_batch=stop)
    result = resume_run(tmp_path / "cut")
    assert result["steps"] == 24
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert [e["step"] for e in events(tmp_path / "cut", "resumed")] == [10]
    assert events(tmp_path / "cut", "validation") == events(tmp_path / "whole", "validation")


def test_sgd_is_the_textbook_update_and_refuses_what_is_adamws() -> None:
    model = paradepth.create_model("vit_nano", depth=1, image_size=8, patch_size=4).double()
    options = {"optimiser": "sgd", "learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.01}
    optimiser = Optimiser(model, Config().replace(**options).optimiser_options)
    named = dict(model.named_parameters())
    by_hand = {name: parameter.detach().clone() for name, parameter in named.items()}
    velocity = {name: torch.zeros_like(value) for name, value in by_hand.items()}
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for factor in (1.0, 0.5, 0.5):
        optimiser.zero_grad()
        model(images).square().sum().backward()
        optimiser.set_rates(dict.fromkeys(model.parts(), factor))
        for name, parameter in named.items():
            assert parameter.grad is not None
            decay = 0.01 if parameter.dim() == 2 and "positions" not in name else 0.0
            velocity[name] = 0.8 * velocity[name] + parameter.grad + decay * by_hand[name]
            by_hand[name] = by_hand[name] - 0.1 * factor * velocity[name]
        optimiser.step()
        for name, parameter in named.items():
            torch.testing.assert_close(parameter.detach(), by_hand[name], rtol=0, atol=1e-12)
    for wrong, words in (
        ({"momentum": 1.0, "optimiser": "sgd"}, "momentum is 1.0; it must be at least 0 and below 1"),
        ({"momentum": 0.9}, "momentum is 0.9; it means nothing to optimiser 'adamw'"),
        ({"betas": (0.8, 0.9), "optimiser": "sgd"}, "they mean nothing to optimiser 'sgd'"),
    ):
        with pytest.raises(ValueError, match=words):
            check_options(Config().replace(**wrong))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_stops_and_the_run_resumes_exactly(name: str, tmp_path: Path) -> None:
    config = tiny_config("stagewise", checkpoint_every=1000)
    start_run(config, tmp_path / "whole")

    def interrupt(step: int) -> None:
        if step == 7:
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(Interrupted, match=f"step 7 on {name}"):
        start_run(config, tmp_path / "cut", on_batch=interrupt)
    assert [e["step"] for e in events(tmp_path / "cut", "interrupted")] == [7]
    resume_run(tmp_path / "cut")
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_the_command_stops_cleanly_on_sigterm(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "train",
        "digits_paraformer",
        "--run-dir",
        str(run),
        "--budget",
        "100000 epochs",
        "--checkpoint-every",
        "1000000",
    ]
    process = subprocess.Popen([sys.executable, "-m", "paradepth", *words], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step-00000000").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "on SIGTERM; the state is saved" in error
    assert "Traceback" not in error


def test_a_run_that_got_no_further_than_its_first_checkpoint_starts_once(tmp_path: Path) -> None:
    stop = stop_at(1)
    with pytest.raises(Stop):
        start_run(tiny_config("stagewise", checkpoint_every=1000), tmp_path / "run", on_batch=stop)
    resume_run(tmp_path / "run")
    assert [e["reason"] for e in events(tmp_path / "run", "stage")] == ["start", "fixed", "fixed"]


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config("joint", checkpoint_every=5)
    start_run(config, tmp_path / "whole")
    start_run(config, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    newest = max((tmp_path / "cut" / "checkpoints").iterdir())
    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    resume_run(tmp_path / "cut")
    assert newest.name in capsys.readouterr().err
    assert [e["step"] for e in events(tmp_path / "cut", "resumed")] == [20]
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_non_finite_loss_stops_with_step_and_advice_after_saving(tmp_path: Path) -> None:
    config = tiny_config("joint", learning_rate=1e30, warmup=0.0, clip=0.0, checkpoint_every=1000)
    with pytest.raises(NonFiniteLoss, match=r"at step \d+, batch \d+ .*lower learning_rate"):
        start_run(config, tmp_path / "run")
    steps = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(steps) > 0
    (diverged,) = events(tmp_path / "run", "diverged")
    assert diverged["step"] == max(steps)
    assert None in (diverged["loss"], diverged["gradient_norm"])
    with pytest.raises(NonFiniteLoss):  # the state is that from before, so it happens again, and is logged once
        resume_run(tmp_path / "run")
    assert events(tmp_path / "run", "diverged") == [diverged]
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 5000}, "only 1295 training samples"),
        ({"batch_size": 10, "accumulate": 3}, "multiple of 3"),
        ({"patch_size": 9}, "larger than image_size"),
        ({"data": "pictures"}, "pictures"),
        ({"data": "fashion_mnist", "data_dir": "no/such/place"}, "no/such/place"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"branches": 0}, "at least 1"),
        ({"model": "resnet"}, "unknown model"),
        ({"model": "vit_nano", "branches": None, "schedule": "one_pass"}, "serial"),
        ({"aggregate": "sum", "schedule": "stagewise"}, "new_branch"),
        ({"prefix_weights": (1.0,), "schedule": "one_pass"}, "needs 3 numbers"),
        ({"device": "tpu"}, "device"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        start_run(tiny_config("joint", **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_directories_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        start_run(tiny_config(), full)
    with pytest.raises(ValueError, match="not a run"):
        start_run(tiny_config(), full, overwrite=True)
    assert (full / "thesis.tex").read_text() == "precious"
    with pytest.raises(ValueError, match="is a file"):
        start_run(tiny_config(), full / "thesis.tex")
    with pytest.raises(ValueError, match="not a run directory"):
        resume_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot be written"):
        start_run(tiny_config(), "/proc/paradepth")


def test_a_finished_run_is_not_resumed_and_overwriting_replaces_it(tmp_path: Path) -> None:
    start_run(tiny_config(), tmp_path / "run")
    with pytest.raises(ValueError, match="finished"):
        resume_run(tmp_path / "run")
    start_run(tiny_config("one_pass", seed=5), tmp_path / "run", overwrite=True)
    assert read_run_config(tmp_path / "run").schedule_options.schedule == "one_pass"


def torchrun(processes: int, run: Path, **options: object) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0", "--standalone"]
    command = [sys.executable, *launcher, "-m", "paradepth", "train", "digits_paraformer", f"--run-dir={run}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cycle", "stagewise-frozen"])
def test_two_processes_follow_the_losses_of_one(schedule: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"branches": 3, "patch_size": 4, "budget": "12 steps", "batch_size": 32, "validations": 4}
    options |= {
        "threads": 1,
        "precision": "float32",
        "crop_padding": 1,
        "accumulate": 2,
        "device": "cpu",
        "warmup": 0.0,
    }
    extra = {"schedule": "cycle"} if schedule == "cycle" else {"schedule": "stagewise", "predecessors": "frozen"}
    for processes in (1, 2):
        torchrun(processes, tmp_path / str(processes), **options, **extra)
    one, two = (events(tmp_path / str(p), "validation") for p in (1, 2))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["layer_evals"] == a["layer_evals"]
    assert events(tmp_path / "2", "stage") == events(tmp_path / "1", "stage")


def gradients(trainer: Trainer, objective: Objective) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8)
    loss, _ = trainer._prepared_step()(images, labels, objective)
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("predecessors", ["free", "frozen"])
def test_compiled_gradients_stay_right_when_a_branch_is_activated_or_frozen(predecessors: str, tmp_path: Path) -> None:
    from paradepth.train.checkpoint import CheckpointStore
    from paradepth.train.run import load_data

    collected = []
    for compiled in (False, True):
        config = tiny_config("joint", compile=compiled)
        torch.manual_seed(0)
        model = paradepth.create_model(
            "paraformer_nano", image_size=8, patch_size=4, channels=1, branches=2, depth=1, width=8, heads=2, mlp=16
        )
        options = {"predecessors": predecessors, "new_branch": "random"}
        schedule = build_schedule("stagewise", list(model.parts()), Annealing(), options)
        world = World(0, 1, torch.device("cpu"))
        store = CheckpointStore(tmp_path)
        trainer = Trainer(model, load_data(config), schedule, config, world=world, autocast=None, store=store)
        steps = [gradients(trainer, schedule.objectives(0)[0])]
        schedule.advance(0.5)
        trainer._step_module = None  # what the loop does when the stage changes
        steps.append(gradients(trainer, schedule.objectives(0)[0]))
        collected.append(steps)
    eager, compiled = collected
    assert not any("branches.1" in name for name in eager[0])
    assert any("branches.1" in name for name in eager[1])
    assert any("branches.0" in name for name in eager[1]) == (predecessors == "free")
    for a, b in zip(eager, compiled, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_ema_weights_are_what_is_saved(tmp_path: Path) -> None:
    start_run(tiny_config(ema=0.99), tmp_path / "ema")
    start_run(tiny_config(), tmp_path / "plain")
    assert not same_weights(tmp_path / "ema", tmp_path / "plain")
    newest = load_file(max((tmp_path / "ema" / "checkpoints").iterdir()) / "tensors.safetensors")
    for name, value in weights(tmp_path / "ema").items():
        assert torch.equal(newest[f"average/{name}"], value)
        assert torch.equal(newest[f"model/{name}"], weights(tmp_path / "plain")[name])


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    for parts in (1, 4):
        start_run(tiny_config(accumulate=parts, dropout=0.0, budget="6 steps"), tmp_path / str(parts))
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-4)


def test_muon_takes_the_trunk_matrices_and_moments_are_kept_by_name() -> None:
    model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=4, branches=2, depth=1)
    config = tiny_config(optimiser="muon")
    optimiser = Optimiser(model, config.optimiser_options)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimiser.step()
    state = optimiser.state_tensors()
    assert "trunk.branches.0.layers.0.mlp.up.weight:momentum_buffer" in state
    assert "stem.embed.weight:exp_avg" in state
    grown = model.grow(1)
    again = Optimiser(grown, config.optimiser_options)
    again.load_state_tensors(state)
    assert again.state_tensors().keys() == state.keys()
    assert all(torch.equal(again.state_tensors()[name], value) for name, value in state.items())


def test_frozen_predecessors_do_not_move(tmp_path: Path) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}
    config = tiny_config("stagewise-frozen", checkpoint_every=1, keep=100)  # stages start at steps 0, 4 and 12
    start_run(config, tmp_path / "run")
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir()):
        seen[int(path.name.removeprefix("step-"))] = load_file(path / "tensors.safetensors")
    for name in seen[0]:
        if name.startswith(("model/stem", "model/trunk.branches.0")):
            assert torch.equal(seen[5][name], seen[24][name]), name
        if name.startswith("model/trunk.branches.2"):
            assert torch.equal(seen[0][name], seen[12][name]), name
    moved = [n for n in seen[0] if n.startswith("model/trunk.branches.1") and not torch.equal(seen[5][n], seen[12][n])]
    assert moved


def test_tensorboard_and_quiet_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(tiny_config(tensorboard=True, validations=2), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    error = capsys.readouterr().err
    assert error.count("\n") <= 4, "not a terminal: a headline and one line for each validation"
    assert "\x1b" not in error


def test_bf16_autocast_trains_close_to_float32(tmp_path: Path) -> None:
    results = {p: start_run(tiny_config(precision=p, dropout=0.0), tmp_path / p) for p in ("float32", "bf16")}
    assert results["bf16"]["loss"][-1] == pytest.approx(results["float32"]["loss"][-1], rel=0.05)
    assert results["bf16"]["loss"][-1] != results["float32"]["loss"][-1]
    assert json.loads((tmp_path / "bf16" / "environment.json").read_text())["precision"] == "bf16"
