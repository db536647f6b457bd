"""Plans: how they are written, what is refused before any work, and that steps leave the given model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paradepth
from compress_helpers import bench_for, classifier, images, other_kinds, same, weights
from paradepth.compress import (
    STEPS,
    Distil,
    Heads,
    Magnitude,
    Merge,
    Neurons,
    Prefix,
    Step,
    Subset,
    Tune,
    Workbench,
    apply_plan,
    check_plan,
    parse_plan,
    plan_text,
)
from paradepth.models import HFClassifier
from paradepth.train import start_run
from runs import tiny_config

counts = st.integers(1, 10**6)
steps = st.one_of(
    *(st.builds(kind, counts) for kind in (Prefix, Subset, Merge, Heads, Neurons, Tune, Distil)),
    st.builds(Magnitude, st.floats(0, 1, exclude_min=True, exclude_max=True)),
)


@given(plan=st.lists(steps, min_size=1, max_size=4).map(tuple))
def test_a_plan_is_read_as_it_is_written(plan: tuple[Step, ...]) -> None:
    assert parse_plan(plan_text(plan)) == plan
    assert parse_plan(" + ".join(str(step) for step in plan)) == plan
    for step in plan:
        assert STEPS[step.name] is type(step)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown step ''"),
        ("prefix=2+", "unknown step ''"),
        ("prefx=2", "did you mean 'prefix'"),
        ("subset", "needs a number of branches"),
        ("subset=", "whole number of branches"),
        ("heads=1.5", "whole number of heads"),
        ("neurons=0", "at least 1"),
        ("tune=-3", "tune is -3"),
        ("prefix=two", "'two'"),
        ("magnitude", "magnitude=0.5, say"),
        ("magnitude=half", "'half'"),
        ("magnitude=0", "above 0 and below 1"),
        ("magnitude=1.0", "above 0 and below 1"),
        ("magnitude=50", "above 0 and below 1"),
        ("magnitude=nan", "above 0 and below 1"),
    ],
)
def test_what_is_no_plan_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_plan(text)


class _Last(Step):
    name, last = "rounding", True

    def apply(self, model: Any, bench: Workbench) -> Any:
        return model


def test_nothing_follows_a_step_that_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, "rounding", _Last)
    assert plan_text(parse_plan("prefix=1+rounding")) == "prefix=1+rounding"
    for text in ("rounding+prefix=1", "prefix=1+rounding+rounding"):
        with pytest.raises(ValueError, match="rounding must be the last step"):
            parse_plan(text)
    with pytest.raises(ValueError, match="rounding has no setting"):
        parse_plan("rounding=3")
    with pytest.raises(ValueError, match="empty"):
        check_plan([], classifier(branches=2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prefix=4", "prefix is 4, and the model has 3 branches; it must be between 1 and 3"),
        ("prefix=2+subset=3", "subset is 3, and the model has 2 branches"),
        ("merge=1+prefix=2", "prefix is 2, and the model has 1 branches"),
        ("heads=3", "every layer has 2 heads"),
        ("heads=1+heads=2", "every layer has 1 heads"),
        ("neurons=8+neurons=9", "every layer has 8 neurons"),
    ],
)
def test_a_step_is_held_against_what_the_ones_before_it_leave(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_plan(parse_plan(text), classifier(branches=3))


@pytest.mark.parametrize("name", ["prefix", "subset", "merge"])
def test_a_serial_stack_has_no_branches_to_leave(name: str) -> None:
    model = classifier(branches=0, depth=2)
    with pytest.raises(ValueError, match="this model is a serial stack of depth 2"):
        check_plan(parse_plan(f"{name}=1"), model)
    with pytest.raises(ValueError, match="serial stack"):
        STEPS[name].parse("1").apply(model, bench_for(model, *images()))


def test_merging_is_for_branches_that_are_alike() -> None:
    with pytest.raises(ValueError, match="SourceLayer"):
        check_plan(parse_plan("merge=1"), other_kinds()["translation"][0])
    uneven = classifier(branches=3, depths=(1, 2, 1))
    with pytest.raises(ValueError, match="2 different depths"):
        check_plan(parse_plan("merge=1"), uneven)
    smaller = apply_plan(parse_plan("merge=2"), uneven, bench_for(uneven, *images()))
    assert smaller.config.branch_depths == (1, 2)


def test_layers_of_the_transformers_library_keep_their_shape() -> None:
    pytest.importorskip("transformers")
    hf = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    hf |= {"num_hidden_layers": 2, "vocab_size": 30, "max_position_embeddings": 16}
    model = paradepth.create_model("hf_classifier", hf=hf, context=8, separator=2, num_classes=3).eval()
    assert isinstance(model, HFClassifier)
    for text in ("heads=1", "neurons=8", "prefix=1"):
        with pytest.raises(ValueError, match=r"transformers library|serial stack"):
            check_plan(parse_plan(text), model)
    tokens = torch.randint(3, 30, (12, 8))
    bench = bench_for(model, tokens, tokens[:, 0] % 3, learning_rate=1e-3)
    before = weights(model)
    pruned = apply_plan(parse_plan("magnitude=0.5+distil=2"), model, bench)
    assert same(before, weights(model))
    zeros = [int((w == 0).sum()) for n, w in pruned.named_parameters() if "layer" in n and n.endswith("dense.weight")]
    assert sum(zeros) > 1000
    assert torch.isfinite(pruned(tokens)).all()


PLANS = ("prefix=2", "subset=2", "merge=2", "magnitude=0.5", "heads=1", "neurons=5", "tune=2", "distil=2")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("plan", [*PLANS, "subset=2+heads=1+neurons=5+magnitude=0.3+distil=2"])
def test_steps_leave_the_given_model_alone_and_give_the_same_model_again(plan: str, training: bool) -> None:
    model = classifier(branches=3, dropout=0.2).train(training)
    teacher = classifier(branches=3)
    bench = bench_for(teacher, *images(), learning_rate=1e-2)
    before, modes = weights(model), [module.training for module in model.modules()]
    torch.manual_seed(1)
    one = apply_plan(parse_plan(plan), model, bench)
    torch.manual_seed(2)
    two = apply_plan(parse_plan(plan), model, bench)
    assert same(weights(one), weights(two)), "draws follow from the seed"
    assert same(weights(model), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in (*model.parameters(), *one.parameters()))
    assert not one.training
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("kind", ["texts", "language", "translation"])
def test_models_of_other_tasks_shrink_as_well_and_can_be_saved(kind: str, tmp_path: Path) -> None:
    model, inputs, targets = other_kinds()[kind]
    bench = bench_for(model, inputs, targets, learning_rate=1e-2)
    for plan in ("prefix=2", "subset=2", "merge=2", "magnitude=0.5", "heads=1+tune=2", "neurons=5+distil=2"):
        if kind == "translation" and plan == "merge=2":
            continue
        smaller = apply_plan(parse_plan(plan), model, bench)
        again = paradepth.from_pretrained(smaller.save_pretrained(tmp_path / plan))
        with torch.no_grad():
            assert torch.equal(again(inputs), smaller(inputs))
        assert again.config == smaller.config
        if "magnitude" not in plan:
            assert smaller.forward_flops() < model.forward_flops()
        assert len(bench.validate(smaller).loss) == smaller.prefixes


def test_the_bench_of_a_run(tmp_path: Path) -> None:
    start_run(tiny_config(budget="4 steps", validations=1), tmp_path / "run")
    bench = Workbench.of_run(tmp_path / "run", device="cpu", temperature=3.0)
    assert bench.temperature == 3.0
    assert bench.rate == 0.5 * bench.config.optimiser_options.learning_rate
    smaller = apply_plan(parse_plan("subset=2+neurons=100+distil=2"), bench.teacher, bench)
    assert (smaller.config.branches, smaller.config.mlp) == (2, 100)
    assert bench.notes[0]["step"] == "subset=2"
    found = bench.validate(smaller)
    assert len(found.accuracy) == 2
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"teacher_weight": 1.5}, "between 0 and 1"),
        ({"warmup": 1.0}, "warmup is 1.0"),
    ]
    for options, words in wrong:
        with pytest.raises(ValueError, match=words):
            Workbench.of_run(tmp_path / "run", device="cpu", **options)
    with pytest.raises(ValueError, match="not a run directory"):
        Workbench.of_run(tmp_path)


def test_several_processes_and_data_without_validation_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(branches=2)
    inputs, targets = images()
    with pytest.raises(ValueError, match="no validation samples"):
        bench_for(model, inputs[:0], targets[:0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="there are 2; start one"):
        Workbench.of_run(tmp_path)
