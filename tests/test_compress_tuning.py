"""Training what was shrunk further: the loop against one written out, distillation, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from compress_helpers import bench_for, classifier, entropy, images, other_kinds, same, weights
from paradepth.compress import apply_plan, parse_plan
from paradepth.train.step import IGNORED
from paradepth.train.trainer import NonFiniteLoss


def kl(teacher: Any, student: Any, inputs: Any) -> float:
    with torch.no_grad():
        p, q = (model(inputs).double().log_softmax(dim=-1) for model in (teacher, student))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def test_updates_are_those_of_adamw_with_warm_up_and_cosine() -> None:
    model, (x, targets) = classifier(branches=2), images(12)
    teacher = classifier(branches=3)
    config = {"weight_decay": 0.1, "clip": 0.5, "label_smoothing": 0.1, "betas": (0.8, 0.9)}
    bench = bench_for(
        teacher, x, targets, learning_rate=1e-2, temperature=3.0, teacher_weight=0.4, warmup=0.4, config=config
    )
    found = bench.tune(model, steps=4, teacher=teacher)
    mine = copy.deepcopy(model)
    decayed = [p for n, p in mine.named_parameters() if p.dim() == 2 and "positions" not in n]
    rest = [p for n, p in mine.named_parameters() if p.dim() != 2 or "positions" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    # 1/5 and 2/5 of the way lie in the warm-up, 3/5 and 4/5 behind it.
    cosine = [0.5 * (1 + math.cos(math.pi * (t - 0.4) / 0.6)) for t in (0.6, 0.8)]
    for step, factor in enumerate([0.5, 1.0, *cosine]):
        part = slice(0, 6) if step % 2 == 0 else slice(6, 12)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * factor
        logits = mine(x[part])
        with torch.no_grad():
            wanted = (teacher(x[part]) / 3).softmax(dim=-1)
        hard = F.cross_entropy(logits, targets[part], label_smoothing=0.1)
        soft = (wanted * (wanted.log() - (logits / 3).log_softmax(dim=-1))).sum(dim=-1).mean()
        optimiser.zero_grad()
        (0.6 * hard + 0.4 * 9 * soft).backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
        optimiser.step()
    for name, value in mine.named_parameters():
        torch.testing.assert_close(dict(found.named_parameters())[name], value, rtol=0, atol=1e-10)


def test_tuning_lowers_the_loss_and_distilling_the_divergence() -> None:
    teacher, (x, targets) = classifier(branches=3), images(24)
    bench = bench_for(teacher, x, targets, learning_rate=1e-2, teacher_weight=1.0)
    small = apply_plan(parse_plan("prefix=1"), teacher, bench)
    tuned = apply_plan(parse_plan("tune=30"), small, bench)
    distilled = apply_plan(parse_plan("distil=30"), small, bench)
    assert entropy(tuned, x, targets) < 0.8 * entropy(small, x, targets)
    assert kl(teacher, distilled, x) < 0.3 * kl(teacher, small, x)
    assert kl(teacher, distilled, x) < kl(teacher, tuned, x)


def test_cutting_a_batch_into_parts_changes_nothing() -> None:
    model, inputs, targets = other_kinds()["language"]
    found = [
        dict(
            bench_for(model, inputs, targets, learning_rate=1e-2, config={"accumulate": parts})
            .tune(model, steps=3, teacher=model.truncate(1))
            .named_parameters()
        )
        for parts in (1, 3)
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-9)


def test_targets_that_do_not_count_teach_nothing() -> None:
    model, inputs, targets = other_kinds()["translation"]
    bench = bench_for(model, inputs, targets)
    logits, wanted = (torch.randn(*targets.shape, 19, dtype=torch.float64) for _ in range(2))
    assert (targets == IGNORED).any()
    before = bench.loss(logits, targets, wanted)
    logits[targets == IGNORED] = 7.0
    wanted[targets == IGNORED] = torch.randn(19, dtype=torch.float64)
    assert torch.equal(bench.loss(logits, targets, wanted), before)
    assert torch.isfinite(before)


def test_dropout_is_on_and_follows_from_the_seed() -> None:
    model, (x, targets) = classifier(branches=2, dropout=0.5), images()
    results = []
    for seed in (0, 0, 1):
        results.append(
            weights(bench_for(model, x, targets, learning_rate=1e-2, config={"seed": seed}).tune(model, steps=2))
        )
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    model, (x, targets) = classifier(branches=2), images()
    with torch.no_grad():
        model.head.classify.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="at step 0 of 3 of training the shrunk model further"):
        bench_for(model, x, targets).tune(model, steps=3)


def test_what_cannot_be_tuned_is_refused() -> None:
    model, (x, targets) = classifier(branches=2), images()
    bench = bench_for(model, x, targets)
    with pytest.raises(ValueError, match="steps is 0"):
        bench.tune(model, steps=0)
    with pytest.raises(ValueError, match="the same classes"):
        bench.tune(model, steps=1, teacher=classifier(num_classes=4))
    for masks in ({"trunk.nothing": torch.ones(2, 2)}, {"head.classify.weight": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match="the mask"):
            bench.tune(model, steps=1, masks=masks)
