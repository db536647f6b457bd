"""Growing: nothing moves until something is trained, old parts stay bit for bit where they are frozen, and a grown run
goes on like any other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import paradepth
from paradepth.branches import Batched, Loop, Threads
from paradepth.cli import main
from paradepth.distributed import assign_branches
from paradepth.models import TrunkConfig, TrunkModel, from_pretrained
from paradepth.train import resume_run, start_run
from paradepth.train.accounting import update_cost
from paradepth.train.checkpoint import CheckpointStore
from paradepth.train.config import Config, OptimiserOptions
from paradepth.train.grow import grow_run
from paradepth.train.learning import HeldClasses, check_parts, rates
from paradepth.train.schedules import Annealing, Joint, Objective
from paradepth.train.use import evaluate_run
from runs import events, tiny_config

IMAGES: dict[str, Any] = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "heads": 2, "mlp": 32}
NAMED: dict[str, Any] = {"num_classes": 3, "class_names": ("a", "b", "c")}


def scrambled(model: Any) -> Any:
    """The model with weights that no output projection leaves out."""
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


def classifier(**options: Any) -> Any:
    return scrambled(paradepth.create_model("paraformer_nano", **{**IMAGES, "depth": 2, "branches": 2, **options}))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- models ----------------------------------------------------------------------------------------------------


@given(
    branches=st.integers(0, 3), depth=st.none() | st.integers(1, 3), classes=st.integers(0, 3), seed=st.integers(0, 9)
)
def test_growing_moves_no_logit_and_dropping_gives_the_model_back(
    branches: int, depth: int | None, classes: int, seed: int
) -> None:
    if branches + classes == 0:
        return
    torch.manual_seed(seed)
    model = classifier(**NAMED)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    names = [f"new {i}" for i in range(classes)]
    larger = model.grow(branches, depth=depth if branches else None, classes=names)
    assert larger.config.branch_depths == (2, 2) + (depth or 2,) * branches
    assert larger.config.class_names == ("a", "b", "c", *names)
    assert torch.allclose(larger(x)[:, :3], model(x), rtol=0, atol=1e-12)
    assert torch.equal(larger(x).argmax(dim=1), model(x).argmax(dim=1))
    assert torch.allclose(larger(x)[:, 3:], model(x).mean(dim=1, keepdim=True).expand(5, classes), atol=1e-12)
    again = larger.drop(branches, classes=classes)
    assert again.config == model.config
    assert same(again.state_dict(), model.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_branch_that_was_grown_at_zero_adds_nothing_at_all() -> None:
    model = classifier()
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(model.grow(2, depth=1)(x), model(x))
    assert not torch.equal(model.grow(1, init="random")(x), model(x))


def test_branches_of_unequal_depth_are_saved_truncated_and_counted(tmp_path: Path) -> None:
    model = classifier().grow(1, depth=1).grow(1, depth=3)
    scrambled(model)
    c, x = model.config, torch.rand(3, 1, 8, 8, dtype=torch.float64)
    assert (c.depth, c.depths, c.layers) == (2, (2, 2, 1, 3), 8)
    assert json.loads((model.save_pretrained(tmp_path) / "config.json").read_text())["model"]["depths"] == [2, 2, 1, 3]
    again = from_pretrained(tmp_path)
    assert again.config == c
    assert torch.equal(again(x), model(x))
    for k in range(1, 5):
        assert torch.allclose(model.truncate(k)(x), model(x, branches=k), rtol=0, atol=1e-12)
        assert torch.allclose(model.prefix_logits(x)[k - 1], model(x, branches=k), rtol=0, atol=1e-12)
    assert model.truncate(2).config.depths is None
    assert model.truncate(3).config.branch_depths == (2, 2, 1)
    layer = (model.forward_flops(branches=2) - model.forward_flops(branches=1)) // 2
    assert model.forward_flops() - model.forward_flops(branches=2) == 4 * layer
    assert update_cost(model, Objective(4), model.parts()).layer_evals == 8
    assert update_cost(model, Objective(4), {"branch4", "head"}).layer_evals == pytest.approx(3 + 5 / 3)


def test_executors_agree_on_branches_of_unequal_depth() -> None:
    model = scrambled(classifier().grow(2, depth=1))
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    expected = model(x)
    for executor in (Loop(), Batched(), Threads()):
        model.trunk.executor = executor
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)
        if isinstance(executor, Batched):
            assert executor.groups == ((0, 1), (2, 3))
    owners = assign_branches([branch.depth for branch in model.trunk.first(None)], ranks=2)
    load = [
        sum(b.depth for b, owner in zip(model.trunk.branches, owners, strict=True) if owner == rank) for rank in (0, 1)
    ]
    assert load == [3, 3]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("text_classifier_nano", {"vocab_size": 300, "context": 12, **NAMED}),
        ("tagger_nano", {"vocab_size": 50, "features": 3, "context": 12, **NAMED}),
        ("gpt_nano", {"vocab_size": 300, "context": 12}),
        ("bert_nano", {"vocab_size": 300, "context": 12}),
        ("translator_nano", {"vocab_size": 300}),
    ],
)
def test_models_of_texts_grow(name: str, options: dict[str, Any]) -> None:
    small = {"width": 16, "heads": 2, "mlp": 32, "branches": 2, "depth": 2}
    model = scrambled(paradepth.create_model(name, **small, **options))
    tokens = torch.randint(1, 50, (2, 9, 3) if name == "tagger_nano" else (2, 9))
    inputs = (tokens, tokens) if name == "translator_nano" else tokens
    larger = model.grow(1, depth=1, classes=["d"] if options.get("class_names") else ())
    count = model(inputs).shape[-1]
    assert torch.allclose(larger(inputs)[..., :count], model(inputs), rtol=0, atol=1e-12)
    assert torch.equal(larger(inputs).argmax(dim=-1), model(inputs).argmax(dim=-1))
    again = larger.drop(1, classes=1 if options.get("class_names") else 0)
    assert torch.equal(again(inputs), model(inputs))
    if "class_names" not in options:
        with pytest.raises(ValueError, match="has no classes"):
            model.grow(classes=["d"])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({}, {}, "nothing to grow"),
        ({"branches": -1}, {}, "branches is -1"),
        ({"branches": 1, "depth": 0}, {}, "depth 0"),
        ({"depth": 2, "classes": ["d"]}, {}, "no branch is to be added"),
        ({"classes": ["b"]}, {}, r"\['b'\] are classes of this model already"),
        ({"classes": ["d", "d"]}, {}, r"\['d'\] are given twice"),
        ({"classes": "def"}, {}, "list of names"),
        ({"classes": [""]}, {}, "list of names"),
        ({"classes": 2}, {}, "name the new ones"),
        ({"classes": ["d"]}, {"class_names": ()}, "say how many"),
        ({"classes": -1}, {"class_names": ()}, "at least 0"),
        ({"branches": 1, "init": "ones"}, {}, "'zero' or 'random'"),
        ({"branches": 1}, {"aggregate": "sum"}, "init='random'"),
    ],
)
def test_growth_that_makes_no_sense_is_refused(
    arguments: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = classifier(**{**NAMED, **options})
    with pytest.raises(ValueError, match=message):
        model.grow(**arguments)


def test_a_serial_stack_grows_classes_and_no_branches() -> None:
    model = scrambled(paradepth.create_model("vit_nano", **IMAGES, depth=2, num_classes=4))
    with pytest.raises(ValueError, match="needs a model with branches"):
        model.grow(1)
    with pytest.raises(ValueError, match="needs a model with branches"):
        model.drop(1)
    larger = model.grow(classes=2)
    assert larger.config.num_classes == 6
    assert same(larger.drop(classes=2).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "at least one of them above 0"), ({"branches": 2}, "one must be left"), ({"classes": 3}, "one must be left")],
)
def test_dropping_what_cannot_be_dropped_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(**NAMED).drop(**arguments)


@pytest.mark.parametrize(
    "options",
    [{"depths": (1,)}, {"depths": (1, 0)}, {"depths": (1, 2, 3)}, {"branches": 0, "depths": (2,)}],
)
def test_depths_that_are_not_one_for_each_branch_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="depths is"):
        TrunkConfig(**{"branches": 2, **options})
    with pytest.raises(ValueError, match="give one of them"):
        paradepth.create_model("paraformer_nano", branches=2, depth=2, depths=(1, 2))


# ---- what stays and what is slow -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_held_classes_stay_whatever_the_optimiser_does(kind: str) -> None:
    model = classifier(**NAMED).grow(classes=["d"]).train()
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    held = HeldClasses(model.head, 3)
    learning = [p for p in model.head.parameters() if p.requires_grad]
    optimiser: Any = (
        torch.optim.AdamW(learning, lr=0.1, weight_decay=0.5)
        if kind == "adamw"
        else torch.optim.SGD(learning, lr=0.1, momentum=0.9, weight_decay=0.5)
    )
    for _ in range(3):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.rand(4, 1, 8, 8).double()), torch.tensor([0, 1, 3, 3])).backward()
        held.clear_gradients()
        assert not model.head.classify.weight.grad[:3].any()
        optimiser.step()
        held.restore()
    after = model.head.state_dict()
    assert torch.equal(after["norm.weight"], before["norm.weight"])
    assert torch.equal(after["classify.weight"][:3], before["classify.weight"][:3])
    assert torch.equal(after["classify.bias"][:3], before["classify.bias"][:3])
    assert not torch.equal(after["classify.weight"][3], before["classify.weight"][3])


def test_slow_parts_learn_at_a_part_of_the_rate() -> None:
    parts = ["stem", "branch1", "branch2", "head"]
    schedule = Joint(parts, Annealing(warmup=0.0, decay="constant"))
    found = rates(schedule, OptimiserOptions(slow=("stem", "branch1"), slow_rate=0.25, head_rate=2.0), 0.5)
    assert found == {"stem": 0.25, "branch1": 0.25, "branch2": 1.0, "head": 2.0}
    assert rates(schedule, OptimiserOptions(slow=("trunk",)), 0.5)["branch2"] == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow": ("branch9",)}, "slow names 'branch9'"),
        ({"slow": ("stem",), "freeze": ("stem",)}, "both frozen and slow"),
        ({"freeze": ("head:10",)}, "this model has 10"),
        ({"freeze": ("head:0",)}, "behind its first 0"),
        ({"freeze": ("head:x",)}, "freeze names 'head:x'"),
    ],
)
def test_parts_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parts(OptimiserOptions(**options), ["stem", "branch1", "head"], classes=10)


# ---- runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on digits, with dropout, augmentation and moments."""
    folder = tmp_path_factory.mktemp("grow") / "run"
    start_run(tiny_config("one_pass", branches=2, budget="40 steps", learning_rate=3e-3), folder)
    return folder


def moments(folder: Path) -> dict[str, Tensor]:
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    assert checkpoint is not None
    return {k.removeprefix("optimiser/"): v for k, v in checkpoint.tensors.items() if k.startswith("optimiser/")}


def test_a_grown_run_predicts_the_same_and_keeps_its_moments(run: Path, tmp_path: Path) -> None:
    result = grow_run(run, tmp_path / "new", branches=1, depth=2, options={"budget": "20 steps"})
    old, new = evaluate_run(run), evaluate_run(tmp_path / "new")
    assert new["accuracy"] == [*old["accuracy"], old["accuracy"][-1]]
    assert new["loss"] == [*old["loss"], old["loss"][-1]]
    assert result["depths"] == [1, 1, 2]
    assert result["parameters_added"] == sum(
        p.numel() for p in from_pretrained(tmp_path / "new").trunk.branches[2].parameters()
    )
    mine, theirs = moments(tmp_path / "new"), moments(run)
    assert mine
    assert same(mine, theirs)
    assert result["moments_kept"] == len({key.rsplit(":", 1)[0] for key in theirs})


@pytest.mark.parametrize("classes", [(), ("ten", "eleven")])
def test_a_frozen_run_that_grew_and_learned_gives_the_old_model_back_to_the_last_digit(
    run: Path, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    options = {"budget": "20 steps", "weight_decay": 0.5, "ema": 0.9, "learning_rate": 1e-2}
    grow_run(run, tmp_path / "new", branches=1, classes=classes, options=options)
    resume_run(tmp_path / "new")
    old, new = from_pretrained(run), from_pretrained(tmp_path / "new")
    again = new.drop(1, classes=len(classes))
    assert same(again.state_dict(), old.state_dict())
    assert again.config == old.config
    x = torch.rand(20, 1, 8, 8)
    assert torch.equal(again(x), old(x))
    assert not torch.equal(new(x)[:, :10], old(x))  # the new branch has learned
    again.save_pretrained(tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "model.safetensors"), load_file(run / "model.safetensors"))


@pytest.mark.parametrize("old", ["slowed", "free"])
def test_old_parts_that_are_not_frozen_learn(run: Path, tmp_path: Path, old: Any) -> None:
    grow_run(run, tmp_path / "new", branches=1, old=old, options={"budget": "12 steps", "decay": "constant"})
    resume_run(tmp_path / "new")
    before, after = from_pretrained(run).state_dict(), from_pretrained(tmp_path / "new").state_dict()
    name = "trunk.branches.0.layers.0.mlp.up.weight"
    assert not torch.equal(before[name], after[name])
    training = json.loads((tmp_path / "new" / "config.json").read_text())["training"]
    assert training["slow"] == (["stem", "branch1", "branch2"] if old == "slowed" else [])


def test_a_stagewise_run_goes_on_with_its_new_branches_one_after_another(run: Path, tmp_path: Path) -> None:
    grow_run(run, tmp_path / "new", branches=2, options={"budget": "24 steps", "schedule": "stagewise"})
    resume_run(tmp_path / "new")
    assert [event["active"] for event in events(tmp_path / "new", "stage")] == [3, 4]
    old, new = from_pretrained(run), from_pretrained(tmp_path / "new")
    assert same(new.drop(2).state_dict(), old.state_dict())


def test_new_classes_are_learned_from_new_data(run: Path, tmp_path: Path) -> None:
    for split, count in (("train", 40), ("test", 8)):
        for place, name in enumerate(("bar", "dot")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.new("L", (8, 8), 16 * (i % 4))
                for j in range(8):
                    image.putpixel((3, j) if place == 0 else (4 + i % 2, 4), 255)
                image.save(folder / f"{i}.png")
    options = {"budget": "60 steps", "data": "folder", "data_dir": tmp_path / "data", "batch_size": 16, "flip": False}
    grow_run(run, tmp_path / "new", branches=1, classes=("dot", "bar"), options=options)
    result = resume_run(tmp_path / "new")
    assert result["accuracy"][-1] == 1.0
    assert from_pretrained(tmp_path / "new").config.class_names[-2:] == ("dot", "bar")
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text())["confusion"][10][10] == 8
    assert same(from_pretrained(tmp_path / "new").drop(1, classes=2).state_dict(), from_pretrained(run).state_dict())
    # The same classes without an output for them.
    with pytest.raises(ValueError, match="lacks"):
        grow_run(run, tmp_path / "other", branches=1, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to grow"),
        ({"classes": ("3",)}, r"\['3'\] are classes of this model already"),
        ({"branches": 1, "old": "melted"}, "old is 'melted'"),
        ({"branches": 1, "options": {"freeze": ("stem",)}}, "freeze follows"),
        ({"branches": 1, "options": {"slow_rate": 0.5}}, "not slowed"),
        ({"branches": 1, "options": {"schedule": "cycle"}}, "nothing in those of old branches learns"),
        ({"branches": 1, "options": {"batch_size": 10**6}}, "batch_size is 1000000"),
        ({"branches": 1, "options": {"image_size": 16}}, "image_size is"),
    ],
)
def test_runs_that_cannot_grow_so_are_refused_before_anything_is_written(
    run: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grow_run(run, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_serial_and_quantised_runs_are_refused(run: Path, tmp_path: Path) -> None:
    start_run(tiny_config(model="vit_nano", branches=None, depth=1, budget="4 steps"), tmp_path / "serial")
    with pytest.raises(ValueError, match="serial stack"):
        grow_run(tmp_path / "serial", tmp_path / "new", branches=1)
    (tmp_path / "small").mkdir()
    described = json.loads((run / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps({**described, "quantisation": {"weights": "int8"}}))
    with pytest.raises(ValueError, match="is quantised"):
        grow_run(tmp_path / "small", tmp_path / "new", branches=1)


def test_a_text_classifier_grows_by_name_and_a_language_model_has_no_classes(tmp_path: Path) -> None:
    rows = "".join(f"{word} film,{label}\n" for word, label in (("fine", "good"), ("poor", "bad")) for _ in range(30))
    (tmp_path / "old.csv").write_text("text,label\n" + rows)
    (tmp_path / "new.csv").write_text("text,label\n" + rows + "so so,mixed\n" * 30)
    common: dict[str, Any] = {"width": 16, "mlp": 32, "context": 12, "precision": "float32", "device": "cpu"}
    common |= {"branches": 1, "depth": 1, "budget": "8 steps", "batch_size": 8, "validations": 1}
    texts = {"model": "text_classifier_nano", "data": "labelled", "tokenizer": "bytes"}
    start_run(Config().replace(**common, **texts, data_dir=tmp_path / "old.csv"), tmp_path / "texts")
    options = {"data_dir": tmp_path / "new.csv", "budget": "8 steps"}
    grow_run(tmp_path / "texts", tmp_path / "more", branches=1, classes=("mixed",), options=options)
    resume_run(tmp_path / "more")
    assert from_pretrained(tmp_path / "more").config.class_names == ("bad", "good", "mixed")
    (tmp_path / "corpus.txt").write_text("a good film and a bad film. " * 200)
    language = {"model": "gpt_nano", "data": "text", "tokenizer": "bytes", "data_dir": tmp_path / "corpus.txt"}
    start_run(Config().replace(**common, **language), tmp_path / "gpt")
    with pytest.raises(ValueError, match="come from the data"):
        grow_run(tmp_path / "gpt", tmp_path / "new", classes=("x",))
    grow_run(tmp_path / "gpt", tmp_path / "larger", branches=1, depth=2)
    resume_run(tmp_path / "larger")
    assert from_pretrained(tmp_path / "larger").config.depths == (1, 2)


# ---- the command -----------------------------------------------------------------------------------------------


def paradepth_command(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "paradepth", *words, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_makes_a_run_that_resume_trains(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    words = ["--branches", "+1", "--depth", "2", "--out", str(new), "--budget", "10 steps", "--learning-rate", "0.002"]
    grown = paradepth_command("grow", str(run), *words)
    assert (grown["branches"], grown["old"]) == (3, "frozen")
    result = paradepth_command("resume", str(new))
    assert result["steps"] == 10
    assert Path(result["report"]).exists()
    assert "1, 1, 2 layers" in Path(result["report"]).read_text()
    model: TrunkModel = from_pretrained(new)
    assert same(model.drop(1).state_dict(), from_pretrained(run).state_dict())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to grow"),
        (["--classes", "3", "4"], "collide"),
        (["--branches", "1", "--class-names", "a"], "class_names follows"),
    ],
)
def test_the_command_refuses_in_words(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["grow", str(run), "--out", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err
    assert main(["grow"]) == 2


def test_the_guide_runs_as_printed() -> None:
    guide = (Path(__file__).resolve().parents[1] / "docs" / "grow.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL):
        exec(code, {})
