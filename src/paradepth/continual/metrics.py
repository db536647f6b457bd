"""What a sequence of tasks leaves: accuracy, forgetting, transfer.

R_ij is the accuracy on task j after task i was learned, T the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class ContinualMetrics:
    """Figures of a whole sequence.

    Attributes:
        average_accuracy: (1/T) Σ_j R_Tj, the mean over all tasks at the end.
            Source: Lopez-Paz and Ranzato, Gradient Episodic Memory (arXiv 1706.08840).
        incremental_accuracy: (1/T) Σ_i (1/i) Σ_{j≤i} R_ij, the mean over the sequence of the mean over tasks so far.
            Source: Rebuffi et al., iCaRL (arXiv 1611.07725).
        learning_accuracy: (1/T) Σ_j R_jj, the mean over tasks of what each had when it was just learned.
            Source: Riemer et al., Learning to Learn without Forgetting (arXiv 1810.11910).
        forgetting: 1/(T−1) Σ_{j<T} (max_{i<T} R_ij − R_Tj): what was lost of the best there ever was.
            Source: Chaudhry et al., Riemannian Walk (arXiv 1801.10112).
        backward_transfer: 1/(T−1) Σ_{j<T} (R_Tj − R_jj); negative where later tasks did harm.
            Source: Lopez-Paz and Ranzato.
        forward_transfer: 1/(T−1) Σ_{j>1} (R_{j−1,j} − b_j), b_j that of the untrained model: what is known of a task
            before it is learned. None where models do not have the outputs of tasks that are still to come.
            Source: Lopez-Paz and Ranzato.
    """

    average_accuracy: float
    incremental_accuracy: float
    learning_accuracy: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float | None


def continual_metrics(matrix: Matrix, *, untrained: Sequence[float] | None = None) -> ContinualMetrics:
    """The figures of an accuracy matrix.

    Args:
        matrix: R, T rows of T; what was not measured, above the diagonal, is None.
        untrained: b, of each task; None where there is no such thing.

    Raises:
        ValueError: fewer than two tasks, a matrix that is not square, or nothing on and below its diagonal.

    >>> m = continual_metrics([[0.9, None], [0.6, 0.8]])
    >>> round(m.average_accuracy, 6), round(m.forgetting, 6), round(m.backward_transfer, 6), m.forward_transfer
    (0.7, 0.3, -0.3, None)
    """
    T = len(matrix)
    if T < 2 or any(len(row) != T for row in matrix):
        raise ValueError(
            f"the matrix has {T} rows of {[len(row) for row in matrix]}; it must be square, of two or more"
        )

    def at(i: int, j: int) -> float:
        value = matrix[i][j]
        if value is None:
            raise ValueError(f"accuracy on task {j + 1} after task {i + 1} is missing")
        return value

    last = [at(T - 1, j) for j in range(T)]
    forward = None
    if untrained is not None and all(matrix[j - 1][j] is not None for j in range(1, T)):
        forward = fmean(at(j - 1, j) - untrained[j] for j in range(1, T))
    return ContinualMetrics(
        average_accuracy=fmean(last),
        incremental_accuracy=fmean(fmean(at(i, j) for j in range(i + 1)) for i in range(T)),
        learning_accuracy=fmean(at(j, j) for j in range(T)),
        forgetting=fmean(max(v for row in matrix[:-1] if (v := row[j]) is not None) - last[j] for j in range(T - 1)),
        backward_transfer=fmean(last[j] - at(j, j) for j in range(T - 1)),
        forward_transfer=forward,
    )
