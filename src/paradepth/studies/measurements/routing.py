"""What a finished classifier with branches loses when branches are left out: for some samples, or for all of them.

Every branch is evaluated once on every sample, which gives the sum of any of them with any factors:

- left out by threshold: α_i(x) δ_i(x) counts where α_i(x) is at least a threshold, the thresholds being quantiles of
  the gates on the validation split (of a model without gates nothing is left out so);
- left out for all samples: the best subset of every size, chosen on the validation split.

Shapes: n branches, B samples, N classes, q thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Parts of the pairs of a sample and a branch that are left out on the validation split."""
TOLERANCE = 0.005  # accuracy on the validation split that may be lost by the threshold that is chosen


def measure(
    *, seed: int, data_dir: Path | None, run_dir: Path, source: Path | None, tolerance: float = TOLERANCE
) -> dict[str, float | list[float]]:
    """Accuracy, calibration error and layer evaluations of a run's model with branches left out.

    Args:
        seed: of the cell; nothing is drawn.
        data_dir: where the data lies.
        run_dir: nothing is written there.
        source: the run.
        tolerance: loss of validation accuracy that is accepted.

    Returns:
        `full` accuracy and `calibration_error` on the test split; `subsets`, test accuracy with 0, 1, … n − 1 branches
        left out for all samples. Of a gated model also `gate`, the mean gate, and `gate_spread`, the standard deviation
        of a gate over the samples, both averaged over branches; `constant`, the test accuracy with every gate at its
        mean; of the largest threshold that the tolerance allows `threshold`, test accuracy (`routed`), calibration
        error (`routed_calibration_error`), the part of the layer evaluations that is saved (`saved`), and the accuracy
        of the subsets at that saving (`fixed`, between two sizes by linear interpolation); and by part left out
        `parts_saved` and `parts_accuracy`, on the test split. Of a model without gates these are the subsets'.

    Raises:
        ValueError: no source, or one that is no classifier with branches and gates of samples.
    """
    from paradepth.branches import Branches
    from paradepth.models import ImageClassifier, SequenceClassifier
    from paradepth.studies.measurements._source import Source

    run = Source.read(source, data_dir=data_dir)
    model = run.trained()
    if not isinstance(model, ImageClassifier | SequenceClassifier) or not isinstance(model.trunk, Branches):
        raise ValueError(f"{source} is no classifier with branches")
    if model.causal:
        raise ValueError(f"{source} is causal: its gates are of tokens, and no branch can be left out")
    depths = torch.tensor([float(branch.depth) for branch in model.trunk.first(None)])
    cost_n = depths / depths.sum()
    seen, tested = (_Sums(model, run.task, split) for split in ("validation", "test"))
    ones = torch.ones_like(seen.gates_nB)
    found: dict[str, float | list[float]] = {"full": tested.accuracy(None), "calibration_error": tested.error(None)}
    n = len(cost_n)
    subsets = []  # saved part, and test accuracy of the subset that is best on the validation split
    for left in range(n):
        choices = [torch.tensor([float(i in kept) for i in range(n)]) for kept in combinations(range(n), n - left)]
        best_n = max(choices, key=lambda kept_n: seen.accuracy(kept_n[:, None] * ones))
        saved = 1 - float((best_n * cost_n).sum())
        subsets.append((saved, tested.accuracy(best_n[:, None] * torch.ones_like(tested.gates_nB))))
    found["subsets"] = [accuracy for _, accuracy in subsets]
    if model.trunk.aggregate != "gated":
        found["parts_saved"] = [saved for saved, _ in subsets]
        found["parts_accuracy"] = found["subsets"]
        return found
    found["gate"] = float(tested.gates_nB.mean())
    found["gate_spread"] = float(tested.gates_nB.std(dim=1).mean())
    mean_n1 = seen.gates_nB.mean(dim=1, keepdim=True)
    # Contributions have their gates in them already.
    found["constant"] = tested.accuracy(mean_n1 / tested.gates_nB.clamp(min=1e-6))
    rows = []
    for part in PARTS:
        threshold = float(seen.gates_nB.flatten().quantile(part)) if part else 0.0
        kept, there = ((sums.gates_nB >= threshold).float() for sums in (seen, tested))
        saved = 1 - float((there * cost_n[:, None]).sum(dim=0).mean())
        rows.append((threshold, seen.accuracy(kept), saved, tested.accuracy(there), there))
    threshold, _, saved, accuracy, there = [row for row in rows if row[1] >= rows[0][1] - tolerance][-1]
    return found | {
        "threshold": threshold,
        "routed": accuracy,
        "routed_calibration_error": tested.error(there),
        "saved": saved,
        "fixed": _between(subsets, saved),
        "parts_saved": [row[2] for row in rows],
        "parts_accuracy": [row[3] for row in rows],
    }


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear interpolation in points of rising x.

    >>> _between([(0.0, 1.0), (0.5, 0.0)], 0.25), _between([(0.0, 1.0), (0.5, 0.0)], 0.75)
    (0.5, 0.0)
    """
    ordered = sorted(points)
    for (left, a), (right, b) in pairwise(ordered):
        if left <= x <= right:
            return a + (b - a) * (x - left) / max(right - left, 1e-12)
    return ordered[-1][1] if x > ordered[-1][0] else ordered[0][1]


class _Sums:
    """Logits of sums of branches on a split, every branch evaluated once.

    Attributes:
        gates_nB: α; 1 for a model without gates.
    """

    def __init__(self, model: Any, task: Any, split: str) -> None:
        self.model = model
        self.batches = list(self._evaluated(task, split))
        self.gates_nB = torch.cat([gates for *_, gates in self.batches], dim=1)

    @torch.no_grad()
    def _evaluated(self, task: Any, split: str) -> Iterator[tuple[Any, Tensor, Tensor, Tensor, Tensor]]:
        """Inputs, targets, x, what the branches add to it, and their gates, batch by batch."""
        from paradepth.train.evaluate import in_order

        trunk = self.model.trunk
        for inputs, targets in in_order(task, split):
            x, sides = self.model.embed(inputs)
            delta = trunk.contributions(x, *sides)
            gated = trunk.aggregate == "gated"
            gates = trunk.gates(x, *sides) if gated else torch.ones(len(trunk), len(x))
            yield inputs, targets, x, delta, gates

    @torch.no_grad()
    def _probabilities(self, factors_nB: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, N) with every contribution multiplied by a factor, and targets."""
        found, place = [], 0
        for inputs, _, x, delta, _ in self.batches:
            if factors_nB is not None:
                own = factors_nB[:, place : place + len(x)]
                place += len(x)
                delta = delta * own.view(*own.shape, *(1,) * (delta.dim() - 2))
            found.append(self.model.decode(x + delta.sum(dim=0), inputs).float().softmax(dim=-1))
        return torch.cat(found), torch.cat([targets for _, targets, *_ in self.batches])

    def accuracy(self, factors_nB: Tensor | None) -> float:
        """Part of the samples that are right."""
        p_BN, targets_B = self._probabilities(factors_nB)
        return float((p_BN.argmax(dim=-1) == targets_B).double().mean())

    def error(self, factors_nB: Tensor | None) -> float:
        """Expected calibration error."""
        from paradepth.train.calibration import calibration_error

        p_BN, targets_B = self._probabilities(factors_nB)
        return calibration_error(p_BN.unsqueeze(0), targets_B)[0]
