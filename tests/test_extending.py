"""What users bring: names are registered once, known to training, and refused in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paradepth.branches import BRANCH_EXECUTORS, Loop, branch_executor, register_branch_executor
from paradepth.depth import (
    COARSE_OPERATORS,
    DEPTH_EXECUTORS,
    MGRIT,
    BranchSum,
    DepthExecutor,
    Serial,
    Stack,
    coarse_operator,
    register_coarse_operator,
    register_depth_executor,
)
from paradepth.distributed import shard_depth
from paradepth.models import ImageClassifier, create_model, list_models, register_model, register_model_type
from paradepth.models.pretrained import _MODEL_TYPES
from paradepth.models.registry import _MODELS
from paradepth.nn import EncoderLayer
from paradepth.recipes import RECIPES, get_recipe, register_recipe
from paradepth.train import Config, start_run
from paradepth.train.depth import build_executor, check_depth, depth_processes
from paradepth.train.options import DepthOptions
from paradepth.train.schedules import SCHEDULES, Joint, Schedule, register_schedule
from paradepth.train.tasks import TASKS, ImageTask, register_task, task_class
from runs import events, tiny_config


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """Every registry afterwards as it was before."""
    registries: list[Any] = [
        BRANCH_EXECUTORS, COARSE_OPERATORS, DEPTH_EXECUTORS, SCHEDULES, RECIPES, _MODELS, _MODEL_TYPES, TASKS,
    ]  # fmt: skip
    before = [registry.copy() for registry in registries]
    yield
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept) if isinstance(registry, dict) else registry.extend(kept)


class Reference(DepthExecutor):
    """The serial loop, written out."""

    def __init__(self, *, chunk: int = 1) -> None:
        self.chunk = chunk

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        for n, layer in enumerate(stack.layers):
            x = layer(x, *inputs, step=stack.step_of(n))
        return x


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run, "train")]


def test_a_run_with_executors_of_ones_own_is_the_run_with_the_library_s(tmp_path: Path) -> None:
    register_depth_executor("mine", Reference)
    register_branch_executor("mine", Loop)
    for shape in ({"model": "vit_nano", "branches": None, "depth": 4, "step": 0.25}, {}):
        option = "executor" if shape else "branch_executor"
        for name in ("mine", "serial" if shape else "loop"):
            config = tiny_config(budget="4 steps", validations=1, **shape, **{option: name})
            start_run(config, tmp_path / f"{option}-{name}")
    assert losses(tmp_path / "executor-mine") == losses(tmp_path / "executor-serial")
    assert losses(tmp_path / "branch_executor-mine") == losses(tmp_path / "branch_executor-loop")


def test_options_of_a_depth_executor_are_those_of_its_constructor() -> None:
    register_depth_executor("mine", Reference)
    executor = build_executor(DepthOptions(executor="mine", chunk=3))
    assert isinstance(executor, Reference)
    assert executor.chunk == 3
    with pytest.raises(ValueError, match="'mine' does not take coarsening"):
        build_executor(DepthOptions(executor="mine", coarsening=2))
    with pytest.raises(ValueError, match="nothing to watch"):
        build_executor(DepthOptions(executor="mine", control=True))
    with pytest.raises(ValueError, match="must be one of serial, mgrit, picard, mine"):
        build_executor(DepthOptions(executor="other"))


def test_processes_share_a_stack_only_where_its_executor_knows_how() -> None:
    register_depth_executor("mine", Reference)
    options = DepthOptions(executor="mine")
    model = create_model("vit_nano", image_size=8, depth=4)
    assert depth_processes(options) == 1
    check_depth(model, options, 1)
    with pytest.raises(ValueError, match="layers of one process, and 2 would share"):
        check_depth(model, options, 2)

    class Row:
        size, rank = 2, 0

    with pytest.raises(ValueError, match="Reference evaluates the layers of one process"):
        shard_depth(model.trunk, Row(), executor=Reference())  # pyright: ignore[reportArgumentType]


def test_a_coarse_operator_by_its_name() -> None:
    operator = BranchSum(3)
    register_coarse_operator("thirds", operator)
    assert coarse_operator("thirds") is operator
    executor = build_executor(DepthOptions(executor="mgrit", coarse="thirds"))
    assert isinstance(executor, MGRIT)
    assert executor.coarse == (operator,)
    with pytest.raises(ValueError, match="'thirds', 'branch:k'"):
        coarse_operator("quarters")
    for taken in ("thirds", "sample", "branch:7"):
        with pytest.raises(ValueError, match="already"):
            register_coarse_operator(taken, operator)


def test_a_schedule_by_its_name(tmp_path: Path) -> None:
    @register_schedule
    class Mine(Joint):
        name = "mine"

    for name in ("mine", "joint"):
        start_run(tiny_config(budget="4 steps", validations=1, schedule=name), tmp_path / name)
    assert losses(tmp_path / "mine") == losses(tmp_path / "joint")

    class Nameless(Schedule):
        def objectives(self, pass_index: int) -> Any:
            return ()

    with pytest.raises(ValueError, match="Nameless has no name"):
        register_schedule(Nameless)
    with pytest.raises(ValueError, match=r"schedule is 'other'; it must be one of joint, .*mine"):
        start_run(tiny_config(schedule="other"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_layer_of_ones_own_in_a_model_that_has_a_name(tmp_path: Path) -> None:
    @register_model_type("test_extending")
    class Mine(ImageClassifier):
        model_type = "test_extending"

        def _new_layer(self, **options: Any) -> EncoderLayer:
            return EncoderLayer(self.config.width, heads=1, mlp=8, **options)

    register_model("mine_nano", Mine, width=8, heads=1, branches=2, depth=1)
    assert "mine_nano" in list_models("mine*")
    model = create_model("mine_nano", image_size=8)
    assert {layer.mlp.up.out_features for branch in model.trunk.branches for layer in branch.layers} == {8}
    for wrong, said in (({"name": "gpt_nano"}, "already"), ({"name": "new", "colour": 1}, "unknown options")):
        with pytest.raises(ValueError, match=said):
            register_model(cls=Mine, **wrong)
    with pytest.raises(ValueError, match="there is a model type 'image_classifier' already"):
        register_model_type("image_classifier")(Mine)

    @register_task
    class MyTask(ImageTask):
        model_class = Mine

    assert task_class(Config().replace(model="mine_nano")) is MyTask
    assert task_class(Config()) is ImageTask
    with pytest.raises(ValueError, match=r"MyTask is for data .* and Mine already"):
        register_task(MyTask)
    start_run(tiny_config(model="mine_nano", branches=2, budget="2 steps", validations=1), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_recipe_by_the_name_of_its_function() -> None:
    @register_recipe
    def mine() -> Config:
        """Minutes, and 10 %."""
        return Config().replace(seed=7)

    assert get_recipe("mine").run_options.seed == 7
    with pytest.raises(ValueError, match="there is a recipe 'mine' already"):
        register_recipe(mine)

    def silent() -> Config:
        return Config()

    with pytest.raises(ValueError, match="no docstring"):
        register_recipe(silent)


def test_what_is_registered_is_new() -> None:
    for register, name, thing in (
        (register_branch_executor, "loop", Loop),
        (register_depth_executor, "serial", Serial),
    ):
        with pytest.raises(ValueError, match=f"'{name}' already"):
            register(name, thing)  # pyright: ignore[reportArgumentType]
    assert isinstance(branch_executor("loop"), Loop)
