"""A pretrained encoder of sentences as branches: what becomes of its embeddings, before and after a short distillation.

Shapes: B batch, T tokens, D width, N sentences.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.data.seeds import generator
from paradepth.depth import DepthExecutor, Stack, parallelize
from paradepth.depth.as_branches import Groups
from paradepth.models import convert
from paradepth.studies._sentence_encoder import (
    LAYERS,
    Encoder,
    Sentences,
    autocast,
    load_encoder,
    load_sentences,
    sentence_means,
)
from paradepth.studies.measurements.branch_sum import Figures, of_stack
from paradepth.theory.branch_sum import interval_lengths
from paradepth.train.schedules import Annealing


def distance(
    *, seed: int, data_dir: Path | None, run_dir: Path, source: Path | None, encoder: str = "minilm", samples: int = 32
) -> Figures:
    """The encoder's stack against its own branch sum, see `measurements.branch_sum`, on SST-2's test sentences.

    Args:
        seed: of the choice of sentences.
        data_dir: where SST-2 lies.
        run_dir, source: not used by what starts from no run: `source` must be None.
        encoder: "minilm", or "random", a small one without training.
        samples: sentences.

    Raises:
        ValueError: a source, or an unknown encoder.
    """
    _refuse_source(source)
    chosen = load_encoder(encoder, seed=seed)
    data = load_sentences(data_dir, seed=seed, probe=1, unlabelled=1)
    order = torch.randperm(len(data.test), generator=generator(seed, "sentences")).tolist()
    inputs = chosen.tokenise([data.test[n] for n in order[:samples]])
    catch = _Catch()
    with torch.no_grad():
        parallelize(copy.deepcopy(chosen.model), LAYERS, executor=catch)(**inputs)
    assert catch.caught is not None
    stack, x_BTD, sides = catch.caught
    figures = of_stack(stack, x_BTD, sides, counted=inputs["attention_mask"].bool())
    return {"lengths": [float(n) for n in interval_lengths(stack.depth)], **figures}


class _Catch(DepthExecutor):
    """Keeps what a stack is called with, and evaluates nothing."""

    def __init__(self) -> None:
        self.caught: tuple[Stack, Any, tuple[Any, ...]] | None = None

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        self.caught = stack, x, inputs
        return x


def conversion(
    *,
    seed: int,
    data_dir: Path | None,
    run_dir: Path,
    source: Path | None,
    branches: int = 1,
    groups: Groups = "consecutive",
    buffers: tuple[int, int] = (0, 0),
    layers: int | None = None,
    encoder: str = "minilm",
    updates: int = 200,
    unlabelled: int = 6400,
    batch_size: int = 32,
    learning_rate: float = 3e-4,
    probe: int = 1000,
) -> Figures:
    """Embeddings of SST-2's test sentences by the encoder as branches, right after conversion and after distillation.

    Args:
        seed: of the choice and order of sentences.
        data_dir: where SST-2 lies.
        run_dir: not written to.
        source: must be None.
        branches, groups, buffers: of the conversion, see `paradepth.convert`.
        layers: instead of branches, the first so many layers alone: a serial stack as shallow as a branch.
        encoder: "minilm", or "random", a small one without training.
        updates: of the distillation, by AdamW.
        unlabelled: sentences that it is trained on, again and again where they do not last.
        batch_size: sentences of an update.
        learning_rate: peak.
        probe: labelled sentences that the linear probe learns from; none of them is distilled on.

    Returns:
        Lists of two, right after conversion and after distillation: `cosine`, mean cosine of a sentence's embedding to
        the serial one; `similarity`, correlation of the cosines of all pairs of sentences; `probe_accuracy` of a linear
        classifier of sentiment. `serial_accuracy`, the same of the serial encoder; `sequential`, layers that wait for
        one another; `parameters`, `layers`, `layer_evals` (the teacher's forward passes count a third).

    Raises:
        ValueError: a source, an unknown encoder, branches and layers together, or what cannot be converted.
    """
    _refuse_source(source)
    if layers is not None and (branches != 1 or tuple(buffers) != (0, 0)):
        raise ValueError(f"layers is {layers}, branches {branches} and buffers {buffers}; layers alone are no branches")
    teacher = load_encoder(encoder, seed=seed)
    depth = len(teacher.model.get_submodule(LAYERS))
    if layers is None:
        student = convert(teacher.model, branches=branches, groups=groups, buffers=tuple(buffers), path=LAYERS)  # pyright: ignore[reportArgumentType]
        between = depth - sum(buffers)
        sequential = sum(buffers) + -(-between // branches)
    else:
        student, sequential = first_layers(teacher.model, layers), layers
    data = load_sentences(data_dir, seed=seed, probe=probe, unlabelled=unlabelled)
    wanted, serial = _judge(teacher, teacher.model, data)
    figures = [_figures(teacher, student, data, wanted)]
    distil(teacher, student, data.unlabelled, updates=updates, batch_size=batch_size, rate=learning_rate, seed=seed)
    figures.append(_figures(teacher, student, data, wanted))
    own = layers or depth
    return {
        **{key: [found[key] for found in figures] for key in figures[0]},
        "serial_accuracy": serial,
        "sequential": sequential,
        "parameters": sum(p.numel() for p in student.parameters()),
        "layers": own,
        "layer_evals": updates * batch_size * (own + depth / 3),
    }


def first_layers(model: Any, layers: int) -> Any:
    """A copy of an encoder with its first layers alone.

    Raises:
        ValueError: more layers than it has, or none.
    """
    have = len(model.get_submodule(LAYERS))
    if not 1 <= layers <= have:
        raise ValueError(f"layers is {layers}; the encoder has {have}")
    shallow = copy.deepcopy(model)
    del shallow.get_submodule(LAYERS)[layers:]
    return shallow


def distil(
    teacher: Encoder, student: Any, texts: Sequence[str], *, updates: int, batch_size: int, rate: float, seed: int
) -> None:
    """Trains an encoder, in place, towards the states and the embeddings of another: mean squared distance of the last
    states relative to their size, and one minus the cosine of the embeddings.

    Raises:
        FloatingPointError: the loss became infinite or not a number.
    """
    student.train()
    for part in student.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # the teacher draws none
    optimiser = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.01)
    anneal = Annealing(warmup=0.1)
    order = torch.randperm(len(texts), generator=generator(seed, "distillation")).tolist()
    for step, chosen in enumerate(_batches(order, updates, batch_size)):
        for group in optimiser.param_groups:
            group["lr"] = rate * anneal((step + 1) / (updates + 1))
        batch = [texts[n] for n in chosen]
        with autocast():
            with torch.no_grad():
                wanted_BTD, counted_BT1 = teacher.states(teacher.model, batch)
            states_BTD, _ = teacher.states(student, batch)
        missing = ((states_BTD.float() - wanted_BTD.float()).square() * counted_BT1).sum()
        size = (wanted_BTD.float().square() * counted_BT1).sum()
        cosine_B = (sentence_means(states_BTD, counted_BT1) * sentence_means(wanted_BTD, counted_BT1)).sum(dim=-1)
        loss = missing / size + (1 - cosine_B).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of distillation is {float(loss)} at update {step} of {updates}")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
    student.eval()


def _batches(order: list[int], updates: int, size: int) -> Iterator[list[int]]:
    for step in range(updates):
        yield [order[(step * size + k) % len(order)] for k in range(size)]


def _refuse_source(source: Path | None) -> None:
    if source is not None:
        raise ValueError(f"source is {source}; this measurement starts from a pretrained encoder, not from a run")


# ---- figures ---------------------------------------------------------------------------------------------------


def _judge(encoder: Encoder, model: Any, data: Sentences) -> tuple[Tensor, float]:
    """Embeddings of the test sentences, and the accuracy of a linear probe on embeddings of `model`."""
    from sklearn.linear_model import LogisticRegression

    probe_ND, test_ND = encoder.embed(model, data.probe), encoder.embed(model, data.test)
    linear = LogisticRegression(max_iter=1000).fit(probe_ND.numpy(), data.probe_labels_N.numpy())
    return test_ND, float(linear.score(test_ND.numpy(), data.test_labels_N.numpy()))


def _figures(encoder: Encoder, model: Any, data: Sentences, wanted_ND: Tensor) -> dict[str, float]:
    found_ND, accuracy = _judge(encoder, model, data)
    rows, columns = torch.triu_indices(len(found_ND), len(found_ND), offset=1)
    pairs = torch.stack([(x @ x.T)[rows, columns] for x in (found_ND, wanted_ND)])
    return {
        "cosine": float((found_ND * wanted_ND).sum(dim=-1).mean()),
        "similarity": float(torch.corrcoef(pairs)[0, 1]),
        "probe_accuracy": accuracy,
    }
