"""Early stop: branches one after another, each on the samples that are not yet certain.

    branch 1 ─► confidence ≥ τ_1?  ─ yes ─► done
                   │ no: the samples that are left
    branch 2 ─► confidence ≥ τ_2?  ─ yes ─► done
                   …
    branch n ─► done

A prefix of branches is a model of its own, so a sample that stops early gets what `truncate` would give it. The
confidence is the probability of the likeliest class.

Shapes: n branches, B batch, A samples that are left, T tokens, D width, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paradepth.branches import Branches
from paradepth.branches.branches import next_state
from paradepth.depth import Stack
from paradepth.depth.state import State
from paradepth.models.base import TrunkModel
from paradepth.models.image_classifier import ImageClassifier
from paradepth.models.sequence_classifier import SequenceClassifier

NEVER = math.inf  # a threshold that no sample reaches


@dataclass(frozen=True)
class Stopped:
    """Where samples stopped: `logits_BN` of the last branch that each used, and the number of branches `used_B`."""

    logits_BN: Tensor
    used_B: Tensor


class EarlyStop:
    """A classifier with branches that stops for each sample as soon as it is confident; what is left out is saved.

    Args:
        model: an image classifier or a classifier of texts, with at least two branches; put it in evaluation mode.
        thresholds: the confidence at which a sample stops after branch 1, 2, … n − 1; `calibrate` finds them. 0 stops
            every sample, `NEVER` none.

    Raises:
        ValueError: another kind of model, a serial one, or thresholds that do not fit it.

    >>> from paradepth import create_model
    >>> model = create_model("paraformer_nano", image_size=8, patch_size=4, branches=3, depth=1, num_classes=5).eval()
    >>> images = torch.rand(4, 3, 8, 8)
    >>> EarlyStop(model, [0.0, 0.0])(images).used_B.tolist(), EarlyStop(model, [NEVER, 0.0])(images).used_B.tolist()
    ([1, 1, 1, 1], [2, 2, 2, 2])
    """

    def __init__(self, model: TrunkModel, thresholds: Sequence[float]) -> None:
        check_early_stop(model)
        if len(thresholds) != model.prefixes - 1:
            raise ValueError(
                f"there are {len(thresholds)} thresholds; a model with {model.prefixes} branches takes "
                f"{model.prefixes - 1}, one after each branch but the last"
            )
        if not all(threshold >= 0 for threshold in thresholds):
            raise ValueError(f"thresholds are {list(thresholds)}; they are confidences and must be at least 0")
        self.model = model
        self.thresholds = tuple(float(threshold) for threshold in thresholds)

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Stopped:
        """Classifies samples; branch i is evaluated on those that no earlier threshold stopped.

        Args:
            inputs: what the model takes, samples first.
        """
        trunk = self.model.trunk
        assert isinstance(trunk, Branches)
        x_ATD, sides = self.model.embed(inputs)
        gates_nA = trunk.gates(x_ATD, *sides) if trunk.aggregate == "gated" else None
        left_A = torch.arange(len(x_ATD), device=x_ATD.device)
        state: State | None = None
        used_B = torch.zeros_like(left_A)
        logits_BN: Tensor | None = None
        branches: list[Stack] = trunk.first(None)
        for i, (branch, threshold) in enumerate(zip(branches, (*self.thresholds, 0.0), strict=True)):
            alpha_A = None if gates_nA is None else gates_nA[i]
            g_ATD = branch(x_ATD, *sides)
            state = next_state(state, (g_ATD,), (x_ATD,), aggregate=trunk.aggregate, alpha=alpha_A)
            logits_AN = self.model.decode(state[0], inputs)
            done_A = confidence(logits_AN) >= threshold
            if logits_BN is None:
                logits_BN = torch.zeros_like(logits_AN)
            stopped = left_A[done_A]
            logits_BN[stopped] = logits_AN[done_A]
            used_B[stopped] = i + 1
            if len(stopped) == len(left_A):
                break
            if len(stopped):
                on_A = ~done_A
                B = len(left_A)
                x_ATD, state, left_A = x_ATD[on_A], (state[0][on_A],), left_A[on_A]
                gates_nA = None if gates_nA is None else gates_nA[:, on_A]
                inputs = tuple(part[on_A] for part in inputs) if isinstance(inputs, tuple) else inputs[on_A]
                sides = tuple(side[on_A] if isinstance(side, Tensor) and len(side) == B else side for side in sides)
        assert logits_BN is not None
        return Stopped(logits_BN, used_B)


def check_early_stop(model: Any) -> None:
    """Refuses a model that cannot stop early.

    Raises:
        ValueError: another kind of model than a classifier, one with fewer than two branches, or one that is shared
            between processes.
    """
    if not isinstance(model, ImageClassifier | SequenceClassifier):
        raise ValueError(
            f"early stop takes one decision for each sample, as classifiers of images and of texts do; a model of type "
            f"{model.model_type!r} does not"
        )
    if not isinstance(model.trunk, Branches) or len(model.trunk) < 2:
        raise ValueError("early stop needs a model with at least two branches: there is nothing to leave out")
    model.check_whole()


def confidence(logits: Tensor) -> Tensor:
    """The probability of the likeliest class, (…, N) to (…), in float32 or better."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.softmax(dim=-1).amax(dim=-1)


def stopping_points(confidence_nB: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The number of branches that each sample uses, (B,), from the confidences of all prefixes.

    >>> stopping_points(torch.tensor([[0.9, 0.4, 0.4], [0.9, 0.9, 0.4], [0.9, 0.9, 0.9]]), [0.8, 0.5]).tolist()
    [1, 2, 3]
    """
    bars_n1 = torch.tensor([*thresholds, 0.0], dtype=torch.float64, device=confidence_nB.device).unsqueeze(1)
    return (confidence_nB.double() >= bars_n1).int().argmax(dim=0) + 1  # of equal values the first


def calibrate(logits_nBN: Tensor, targets_B: Tensor, *, tolerance: float = 0.0) -> tuple[float, ...]:
    """Thresholds that lose no more than `tolerance` of the accuracy of the full model, on these samples.

    After each branch the samples that are left stop, the most confident first, until they would lose more than the part
    of the tolerance that may be used up by then: k/(n−1) of it after branch k. A sample counts as lost when it stops
    wrong and the full model is right, as won the other way round. A threshold lies halfway between two confidences.

    Args:
        logits_nBN: of all prefixes, on samples that neither training nor the final test saw: a validation split.
        targets_B: their classes.
        tolerance: loss of accuracy, a part of 1; 0.01 is one percentage point.

    Returns:
        One threshold after each branch but the last; `NEVER` where no sample may stop.

    Raises:
        ValueError: no samples, or a tolerance outside [0, 1).

    >>> logits = torch.tensor([[[3.0, 0.0], [0.0, 0.4]], [[3.0, 0.0], [2.0, 0.0]]])  # branch 2 corrects one
    >>> round(calibrate(logits, torch.tensor([0, 0]))[0], 2)
    0.78
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it is a loss of accuracy, at least 0 and below 1")
    n, B = logits_nBN.shape[:2]
    if not B:
        raise ValueError("early stop is calibrated on samples, and there are none")
    confidence_nB = confidence(logits_nBN.detach()).double()
    right_nB = logits_nBN.argmax(dim=-1) == targets_B
    left_B = torch.ones(B, dtype=torch.bool, device=logits_nBN.device)
    thresholds, lost = [], 0
    for k in range(n - 1):
        allowed = tolerance * B * (k + 1) / (n - 1) - lost
        places = left_B.nonzero().flatten()
        order = confidence_nB[k, places].argsort(descending=True)
        values, places = confidence_nB[k, places][order], places[order]
        losses = (right_nB[-1, places].int() - right_nB[k, places].int()).cumsum(0)
        following = torch.cat([values[1:], values.new_full((1,), -1.0)])
        apart = values - following > 1e-9  # equal confidences stop together
        # Up to where the loss is exceeded for the first time: that it falls again later would be luck.
        fits = apart & ((losses <= allowed) | ~apart).cumprod(0).bool()
        best = fits.nonzero().flatten()
        if not len(best):
            thresholds.append(NEVER)
            continue
        last = int(best[-1])
        stops_all = last + 1 == len(values)
        thresholds.append(0.0 if stops_all else float((values[last] + values[last + 1]) / 2))
        lost += int(losses[last])
        left_B[places[: last + 1]] = False
        if stops_all:
            thresholds += [0.0] * (n - 2 - k)
            break
    return tuple(thresholds)
