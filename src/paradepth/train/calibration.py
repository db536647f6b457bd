"""How far the confidence of a classifier is from how often it is right.

Shapes: n prefixes, B samples, N classes.
"""

from __future__ import annotations

from torch import Tensor

BINS = 15


def calibration_error(p_nBN: Tensor, targets_B: Tensor) -> list[float]:
    """The expected calibration error of each prefix: |accuracy − mean confidence| in `BINS` bins of equal width by the
    probability of the likeliest class, averaged over samples. 0 is best. By torchmetrics' CalibrationError.

    Source: Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks (arXiv 1706.04599).

    Args:
        p_nBN: probabilities.
        targets_B: classes; samples whose class is none of the N (below 0) do not count.

    >>> import torch
    >>> p = torch.tensor([[[0.8, 0.2], [0.8, 0.2]]])  # confidence 0.8
    >>> [round(e, 6) for e in calibration_error(p, torch.tensor([0, 1]))]  # half of them right
    [0.3]
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # slow to import

    known_B = targets_B >= 0
    if not known_B.any():
        return [0.0] * len(p_nBN)
    classes = p_nBN.shape[-1]
    return [
        float(multiclass_calibration_error(p_BN[known_B], targets_B[known_B], num_classes=classes, n_bins=BINS))
        for p_BN in p_nBN
    ]
