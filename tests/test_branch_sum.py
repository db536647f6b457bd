"""How far a stack is from its own branch sum, and a stack in coarse steps alone. In float64 against closed forms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import paradepth
from compress_helpers import classifier, images, other_kinds, roughen
from paradepth.branches import Branches
from paradepth.depth import MGRIT, CoarseSolve, Serial, Stack, coarse_operator
from paradepth.nn import EncoderLayer
from paradepth.studies import get_study
from paradepth.theory.branch_sum import (
    evaluated_by,
    exact_states,
    first_guess,
    interval_distances,
    interval_lengths,
    output_distances,
)

OPERATORS = ["branch", "half", "sample", "branch:3"]


def stack_of(layers: int, *, step: float = 0.3, buffers: tuple[int, int] = (0, 0), causal: bool = False) -> Stack:
    """Layers in float64 whose weights are far from those of a fresh model."""
    made = [EncoderLayer(8, heads=2, mlp=12, causal=causal) for _ in range(layers)]
    return roughen(Stack(made, step=step, buffers=buffers).double().eval())


def state(samples: int = 3, tokens: int = 5) -> Tensor:
    return torch.randn(samples, tokens, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# ---- coarse steps as an executor -------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", OPERATORS)
def test_intervals_of_one_layer_are_serial_depth(coarse: str) -> None:
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    stack, x = stack_of(5, buffers=(1, 2)), state()
    torch.testing.assert_close(stack(x, mask, executor=CoarseSolve(length=1, coarse=coarse)), stack(x, mask))


@given(layers=st.integers(1, 7), length=st.integers(1, 8), first=st.integers(0, 2), last=st.integers(0, 2))
def test_an_interval_is_the_sum_of_its_layers_on_one_input(layers: int, length: int, first: int, last: int) -> None:
    stack = stack_of(first + layers + last, step=0.5, buffers=(first, last))
    x = wanted = state()
    groups = [[n] for n in range(first)]
    groups += [list(stack.between)[at : at + length] for at in range(0, layers, length)]
    groups += [[n] for n in range(first + layers, stack.depth)]
    with torch.no_grad():
        for group in groups:
            wanted = wanted + sum(stack.step_of(n) * stack.layers[n].residual(wanted) for n in group)  # pyright: ignore
        torch.testing.assert_close(stack(x, executor=CoarseSolve(length=length)), wanted)


@pytest.mark.parametrize("coarse", OPERATORS)
@pytest.mark.parametrize(("layers", "length"), [(6, 2), (7, 3), (8, 4)])
def test_it_is_the_first_guess_of_mgrit(coarse: str, layers: int, length: int) -> None:
    stack, x = stack_of(layers), state()
    exact_until = layers - (layers % length or length)
    with torch.no_grad():
        guess = Stack(stack.layers[:exact_until], step=stack.step)(
            x, executor=CoarseSolve(length=length, coarse=coarse)
        )
        wanted = Stack(stack.layers[exact_until:], step=stack.step)(guess)  # MGRIT relaxes the last interval
        found = stack(x, executor=MGRIT(coarsening=length, coarse=coarse, forward_iterations=0))
        torch.testing.assert_close(found, wanted)
        guessed = first_guess(stack, x, length=length, coarse=coarse)
        states = exact_states(stack, x)
        at = guessed.layers.index(exact_until)
        assert guessed.measured[at] == pytest.approx(relative(guess, states[exact_until][0]))


def test_joined_states_and_gradients_pass_through() -> None:
    model, inputs, _ = other_kinds(branches=0, depth=2)["translation"]
    wanted = model(inputs)
    with evaluated_by(model.trunk, CoarseSolve(length=1)):
        torch.testing.assert_close(model(inputs), wanted)
    with evaluated_by(model.trunk, CoarseSolve(length=2)):
        other = model(inputs)
    assert relative(other, wanted) > 1e-3
    other.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trunk.parameters())
    assert isinstance(model.trunk.executor, Serial)


def test_what_cannot_be_is_refused() -> None:
    for length in (0, -1, 1.5):
        with pytest.raises(ValueError, match="whole number of layers, at least 1"):
            CoarseSolve(length=length)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="coarse is 'brunch'"):
        CoarseSolve(length=2, coarse="brunch")
    stack = stack_of(3)
    for lengths in ([4], [0], []):
        with pytest.raises(ValueError, match="between 1 and 3"):
            interval_distances(stack, state(), lengths=lengths)
    with pytest.raises(ValueError, match="there are 2 states; 3 layers have 4"):
        interval_distances(stack, state(), states=exact_states(stack, state())[:2])
    with pytest.raises(ValueError, match="between 1 and 3"):
        first_guess(stack, state(), length=4)
    pair = (state(), state())
    with pytest.raises(ValueError, match="one tensor"):
        interval_distances(stack, pair, counted=torch.ones(3, 5, dtype=torch.bool))


# ---- distances -------------------------------------------------------------------------------------------------


@given(layers=st.integers(1, 40))
def test_lengths_double_up_to_the_whole_stack(layers: int) -> None:
    found = interval_lengths(layers)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (1, layers)
    assert all(b <= 2 * a for a, b in itertools.pairwise(found))


def test_distances_are_what_their_definitions_say() -> None:
    stack, x = stack_of(4), state()
    with torch.no_grad():
        states = [parts[0] for parts in exact_states(stack, x)]
        torch.testing.assert_close(states[-1], stack(x))
        found = {(d.length, d.start): d for d in interval_distances(stack, x)}
        assert sorted(found) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (4, 0)]
        for (length, start), distance in found.items():
            before, behind = states[start], states[start + length]
            sums = before + stack.step * sum(
                stack.layers[n].residual(before)  # pyright: ignore
                for n in range(start, start + length)
            )
            assert distance.increment == pytest.approx(
                float((sums - behind).norm() / (behind - before).norm()), abs=1e-14
            )
            assert distance.state == pytest.approx(relative(sums, behind), abs=1e-14)
            assert (distance.increment > 1e-3) == (length > 1)


@pytest.mark.parametrize(("coarse", "length"), [("branch", 2), ("branch", 4), ("half", 4), ("sample", 2)])
def test_half_the_step_halves_the_error_of_the_increment_and_quarters_that_of_the_state(
    coarse: str, length: int
) -> None:
    stack, x = stack_of(4), state()
    errors = []
    for step in (1e-3, 5e-4):
        stack.step = step
        errors.append(interval_distances(stack, x, lengths=[length], coarse=coarse))
    for larger, smaller in zip(*errors, strict=True):
        if coarse == "sample":  # another layer's increment in the place of several: of order 0 in h
            assert larger.increment / smaller.increment == pytest.approx(1, rel=0.01)
            assert larger.state / smaller.state == pytest.approx(2, rel=0.01)
        else:
            assert larger.increment / smaller.increment == pytest.approx(2, rel=0.02)
            assert larger.state / smaller.state == pytest.approx(4, rel=0.02)


def test_errors_of_intervals_add_up_to_the_first_guess_once_steps_are_small() -> None:
    stack, x = stack_of(8), state()
    missing = []
    for step in (0.1, 0.01, 0.001):
        stack.step = step
        guess = first_guess(stack, x, length=2)
        assert guess.layers == (2, 4, 6, 8)
        assert first_guess(stack, x, length=2, states=exact_states(stack, x)) == guess
        singles = {d.start + 2: d.state for d in interval_distances(stack, x, lengths=[2]) if d.start % 2 == 0}
        assert guess.local == pytest.approx([singles[n] for n in guess.layers])
        assert guess.measured[0] == guess.predicted[0] == guess.local[0]
        missing.append(abs(guess.measured[-1] - guess.predicted[-1]) / guess.measured[-1])
    assert missing[0] > 3 * missing[1] > 9 * missing[2] > 0


def test_padding_does_not_count() -> None:
    stack, x = stack_of(4), state()
    real = torch.ones(3, 5, dtype=torch.bool)
    real[0, 2:] = False
    mask = real[:, None, None, :]
    wanted = interval_distances(stack, x, mask, counted=real)
    other = torch.where(real[..., None], x, x + 3)
    found = interval_distances(stack, other, mask, counted=real)
    assert [d.increment for d in found] == pytest.approx([d.increment for d in wanted])
    assert [d.state for d in found] == pytest.approx([d.state for d in wanted])
    assert interval_distances(stack, other, mask)[-1].state != pytest.approx(wanted[-1].state, rel=1e-3)
    guesses = [first_guess(stack, at, mask, length=2, counted=real).measured for at in (x, other)]
    assert guesses[0] == pytest.approx(guesses[1])


def test_layers_of_another_library() -> None:
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=12, batch_first=True, dropout=0.0)
    model = roughen(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval())
    x = state()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 4:] = True
    plain = list(model.layers)
    paradepth.parallelize(model, "layers", executor=CoarseSolve(length=3))
    with torch.no_grad():
        wanted = x + sum(each(x, src_key_padding_mask=padding) - x for each in plain)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), wanted)
    stack: Any = model.layers.stack
    assert [d.state < 1e-14 for d in interval_distances(stack, x)] == [True, True, True, False, False, False]


# ---- outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [0, 2])
def test_outputs_of_a_model_in_coarse_steps(branches: int) -> None:
    model, (inputs, _) = classifier(branches=branches, depth=4), images()
    found = {d.length: d for d in output_distances(model, inputs)}
    assert sorted(found) == [1, 2, 4]
    assert found[1].logits < 1e-12
    assert (found[1].agreement, found[1].divergence) == (1.0, pytest.approx(0, abs=1e-12))
    with torch.no_grad():
        x, _ = model.embed(inputs)
        stacks: list[Any] = list(model.trunk.branches) if isinstance(model.trunk, Branches) else [model.trunk]
        logits = model.decode(x + sum(layer.residual(x) for stack in stacks for layer in stack.layers), inputs)
        exact = model(inputs)
    p, q = exact.softmax(-1), logits.softmax(-1)
    assert found[4].logits == pytest.approx(relative(logits, exact))
    assert found[4].divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert found[4].agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean()) < 1
    torch.testing.assert_close(model(inputs), exact)


def test_encoders_of_transformers() -> None:
    pytest.importorskip("transformers")
    hf = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    hf |= {"num_hidden_layers": 3, "vocab_size": 30, "max_position_embeddings": 16}
    model = paradepth.create_model("hf_classifier", hf=hf, context=8, separator=2, num_classes=3).double().eval()
    tokens = torch.randint(3, 30, (6, 8))
    tokens[0, 5:] = 0
    found = output_distances(roughen(model), tokens)
    assert [d.length for d in found] == [1, 2, 3]
    assert found[0].logits < 1e-12 < 1e-3 < found[2].logits
    x, sides = model.embed(tokens)
    distances = interval_distances(model.trunk, x, *sides, counted=tokens != 0)
    assert [d.state > 1e-3 for d in distances] == [False] * 3 + [True] * 3


def test_operators_of_ones_own_will_do() -> None:
    stack, x = stack_of(4), state()
    named, given_ = (interval_distances(stack, x, coarse=c) for c in ("half", coarse_operator("half")))
    assert named == given_


# ---- the study's verdicts --------------------------------------------------------------------------------------


def records_of(study: Any, figures: Any) -> list[dict[str, Any]]:
    """Records of all cells; `figures` says of a cell what its accuracy is, a loss being what is missing to 3."""
    records = []
    for cell in study.cells:
        jitter = 0.001 * cell.seed
        base = {"name": cell.name, "group": cell.group, "label": cell.label, "seed": cell.seed, "options": cell.options}
        if cell.command == "train":
            accuracy = figures(cell, None) + jitter
            records.append(base | {"accuracy": [accuracy], "loss": [3 - accuracy]})
            continue
        if cell.recipe in ("branch_sum", "sentence_distance"):
            lists = {name: [0.0, 0.1, 0.2, 0.4] for name in ("increment", "state", "first_guess", "logits")}
            lists["predicted"] = [0.0, *(value * figures(cell, None) for value in (0.1, 0.2, 0.4))]
            kinds = ("initial_", "trained_") if cell.recipe == "branch_sum" else ("",)
            measures: dict[str, Any] = {kind + name: values for kind in kinds for name, values in lists.items()}
            measures["lengths"] = [1.0, 2.0, 4.0, 8.0]
        elif cell.recipe == "conversion":
            values = [figures(cell, k) + jitter for k in range(1 + len(cell.options.get("fractions", ())))]
            measures = {}
            for way in cell.options.get("ways", ("tuned", "distilled")):
                measures |= {f"{way}_accuracy": values, f"{way}_loss": [3 - value for value in values]}
        else:
            measures = {name: [0.5, 0.9] for name in ("cosine", "similarity", "probe_accuracy")}
            measures["serial_accuracy"] = 0.8
        records.append(base | {"measures": measures})
    return records


def verdicts_of(figures: Any) -> dict[str, str]:
    study = get_study("branch_sum")
    records = records_of(study, figures)
    assert all(study.findings(records))
    assert study.verdicts is not None
    found = study.verdicts(records)
    assert set(found) == {claim.name for claim in study.claims}
    return {name: verdict.verdict for name, verdict in found.items()}


def test_nothing_is_lost_and_everything_can_be_converted() -> None:
    def figures(cell: Any, k: int | None) -> float:
        return 1.1 if cell.recipe in ("branch_sum", "sentence_distance") else 0.8

    assert set(verdicts_of(figures).values()) == {"holds"}


def test_some_branches_lose_and_some_cannot_be_converted() -> None:
    def figures(cell: Any, k: int | None) -> float:
        if cell.recipe in ("branch_sum", "sentence_distance"):
            return 3.0 if "MiniLM" in cell.label else 1.0
        worse = cell.options.get("branches") == 8
        return 0.8 - (0.1 if worse else 0.0) - (0.5 if k == 0 else 0.0)

    assert set(verdicts_of(figures).values()) == {"holds with conditions"}


def test_branches_lose_and_conversion_does_not_help() -> None:
    def figures(cell: Any, k: int | None) -> float:
        if cell.recipe in ("branch_sum", "sentence_distance"):
            return 0.1
        return 0.7 if cell.options.get("branches", 1) > 1 else 0.8

    assert set(verdicts_of(figures).values()) == {"does not hold"}


def test_one_seed_tells_nothing() -> None:
    study = get_study("branch_sum", "smoke")
    assert study.verdicts is not None
    found = study.verdicts(records_of(study, lambda cell, k: 1.0))
    assert {verdict.verdict for verdict in found.values()} == {"could not be tested here"}
