"""Linear operators on states, as sums of Kronecker products and what is made of them: explicit matrices at small sizes,
products with vectors at any size.

A state X of T tokens and width D is the vector vec(X) = `X.flatten()`: its tokens one after another. Then

    vec(A X Mᵀ) = (A ⊗ M) vec(X)        A (T' × T) mixes tokens, M (D' × D) channels; M is the weight of `nn.Linear`

(with columns one after another, as in method papers, the same operator reads M ⊗ A).

Shapes: B batch, T, D tokens and width of what an operator takes, R, E of what it returns, … any leading dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 2**26  # entries of an explicit operator: half a gigabyte in float64

Size = tuple[int, int]  # tokens, width
Term = tuple[Tensor | None, Tensor | None]  # A (B, R, T) or (R, T), and M (E, D); None is the identity


class Operator(ABC):
    """A linear map of states, one for each sample of a batch where its parts depend on the input.

    Attributes:
        cols: (T, D) of what it takes.
        rows: (R, E) of what it returns.
    """

    cols: Size
    rows: Size

    @abstractmethod
    def matvec(self, x_BTD: Tensor) -> Tensor:
        """The operator times states (…, B, T, D); returns (…, B, R, E)."""

    @property
    @abstractmethod
    def T(self) -> Operator:
        """The transposed operator."""

    @property
    @abstractmethod
    def batch(self) -> int | None:
        """B where the operator differs from sample to sample, None where it is the same for all."""

    @abstractmethod
    def _dense(self) -> Tensor:
        """The matrix, whose size was found to be small."""

    def rmatvec(self, y_BRE: Tensor) -> Tensor:
        """The transposed operator times (…, B, R, E); returns (…, B, T, D)."""
        return self.T.matvec(y_BRE)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix: (R·E, T·D)."""
        return self.rows[0] * self.rows[1], self.cols[0] * self.cols[1]

    def dense(self) -> Tensor:
        """The explicit matrix, (B, R·E, T·D), or (R·E, T·D) where it is the same for all samples.

        Raises:
            ValueError: it would have more than `LIMIT` entries, the samples of a batch together; products (`matvec`,
                `rmatvec`) need none of them.
        """
        batch, (rows, columns) = self.batch or 1, self.shape
        check_explicit(batch * rows * columns, f"this operator ({batch} × {rows} × {columns})")
        return self._dense()

    def __matmul__(self, other: Operator) -> Operator:
        _check_equal(self.cols, other.rows, "a product")
        return Product((self, other))

    def __add__(self, other: Operator) -> Operator:
        _check_equal((self.rows, self.cols), (other.rows, other.cols), "a sum")
        return Sum((self, other), (1.0, 1.0))

    def __sub__(self, other: Operator) -> Operator:
        return self + (-1.0) * other

    def __rmul__(self, factor: float) -> Operator:
        return Sum((self,), (factor,))


def check_explicit(entries: int, what: str) -> None:
    """Refuses what would not fit.

    Raises:
        ValueError: more than `LIMIT` entries.
    """
    if entries > LIMIT:
        raise ValueError(
            f"{what} would have {entries:,} entries as explicit matrices, {entries * 8 / 2**30:.1f} GiB in float64; at "
            f"most {LIMIT:,} are built. Take fewer samples, tokens or channels, or products, which need no matrix"
        )


def _check_equal(a: object, b: object, what: str) -> None:
    if a != b:
        raise ValueError(f"{what} of operators needs equal sizes; these are {a} and {b} (tokens, width)")


class Kronecker(Operator):
    """Σ_k A_k ⊗ M_k: each term mixes tokens by A_k, which may depend on the input, and channels by M_k.

    Args:
        terms: (A_k, M_k), A_k (B, R, T) or (R, T), M_k (E, D); None is the identity. At least one.
        cols: (T, D).
        rows: (R, E).
        like: of the dtype and on the device that explicit matrices shall have, where all factors are identities.

    >>> a, m, x = torch.randn(2, 3, 3), torch.randn(5, 4), torch.randn(2, 3, 4)
    >>> operator = Kronecker([(a, m)], cols=(3, 4), rows=(3, 5))
    >>> bool(torch.allclose(operator.matvec(x), a @ x @ m.T, atol=1e-5))
    True
    >>> bool(torch.allclose(operator.dense()[0] @ x[0].flatten(), operator.matvec(x)[0].flatten(), atol=1e-5))
    True
    """

    def __init__(self, terms: Sequence[Term], *, cols: Size, rows: Size, like: Tensor | None = None) -> None:
        self.terms = tuple(terms)
        self.cols, self.rows = cols, rows
        if not self.terms:
            raise ValueError("a sum of Kronecker products needs at least one term")
        factors = (factor for term in self.terms for factor in term if factor is not None)
        self.like = next(factors, torch.empty(0, dtype=torch.float64) if like is None else like)
        for term in self.terms:
            for factor, row, column in zip(term, rows, cols, strict=True):
                if (row != column) if factor is None else (tuple(factor.shape[-2:]) != (row, column)):
                    found = "the identity" if factor is None else f"of shape {tuple(factor.shape)}"
                    raise ValueError(f"a factor is {found}, and one of {row} × {column} is needed")

    @property
    def batch(self) -> int | None:
        return next((len(left) for left, _ in self.terms if left is not None and left.dim() == 3), None)

    def matvec(self, x_BTD: Tensor) -> Tensor:
        parts = []
        for left, right in self.terms:
            y = x_BTD if left is None else left @ x_BTD
            parts.append(y if right is None else y @ right.mT)
        return sum(parts[1:], parts[0])

    @property
    def T(self) -> Kronecker:
        flipped = [tuple(None if factor is None else factor.mT for factor in term) for term in self.terms]
        return Kronecker(flipped, cols=self.rows, rows=self.cols, like=self.like)  # pyright: ignore[reportArgumentType]

    def _full(self) -> list[tuple[Tensor, Tensor]]:
        """The terms with identities as matrices."""
        return [
            (_eye(self.cols[0], self.like) if a is None else a, _eye(self.cols[1], self.like) if m is None else m)
            for a, m in self.terms
        ]

    def _dense(self) -> Tensor:
        products = [torch.einsum("...rt,ed->...retd", a, m) for a, m in self._full()]
        return sum(products[1:], products[0]).flatten(-4, -3).flatten(-2)

    def times(self, other: Kronecker) -> Kronecker:
        """The product with another sum, as one sum again: (A ⊗ M)(A' ⊗ M') = A A' ⊗ M M' for each pair of terms."""
        _check_equal(self.cols, other.rows, "a product")
        terms = [(_product(a, c), _product(m, n)) for a, m in self.terms for c, n in other.terms]
        return Kronecker(terms, cols=other.cols, rows=self.rows, like=self.like)

    def plus(self, other: Kronecker) -> Kronecker:
        """The sum with another sum, as one sum again."""
        _check_equal((self.rows, self.cols), (other.rows, other.cols), "a sum")
        return Kronecker((*self.terms, *other.terms), cols=self.cols, rows=self.rows, like=self.like)

    def scaled(self, factor: float) -> Kronecker:
        """The sum times a number."""
        terms = [(left, factor * (_eye(self.cols[1], self.like) if m is None else m)) for left, m in self.terms]
        return Kronecker(terms, cols=self.cols, rows=self.rows)

    def squared_norm(self) -> Tensor:
        """‖·‖²_F of each sample's matrix, (B,) or a single number, without building it:
        ⟨A ⊗ M, A' ⊗ M'⟩ = ⟨A, A'⟩ ⟨M, M'⟩."""
        full = self._full()
        zero = self.like.new_zeros(())
        return sum(((a * c).sum((-2, -1)) * (m * n).sum() for a, m in full for c, n in full), zero)


def identity(size: Size, like: Tensor | None = None) -> Kronecker:
    """The identity on states of (T, D); as a matrix, of the dtype and on the device of `like`."""
    return Kronecker([(None, None)], cols=size, rows=size, like=like)


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a @ b


class Diagonal(Operator):
    """Multiplies every entry of a state by a number of its own: gates.

    Args:
        gates_BTD: the numbers, (B, T, D), or broadcast to it, such as (B, T, 1).
        size: (T, D).
    """

    def __init__(self, gates_BTD: Tensor, size: Size) -> None:
        self.gates_BTD = gates_BTD
        self.cols = self.rows = size

    @property
    def batch(self) -> int | None:
        return len(self.gates_BTD)

    def matvec(self, x_BTD: Tensor) -> Tensor:
        return self.gates_BTD * x_BTD

    @property
    def T(self) -> Diagonal:
        return self

    def _dense(self) -> Tensor:
        return torch.diag_embed(self.gates_BTD.expand(-1, *self.cols).flatten(1))


class Product(Operator):
    """The factors one after another, the last one first."""

    def __init__(self, factors: Sequence[Operator]) -> None:
        self.factors = tuple(factors)
        self.rows, self.cols = self.factors[0].rows, self.factors[-1].cols

    @property
    def batch(self) -> int | None:
        return next((factor.batch for factor in self.factors if factor.batch), None)

    def matvec(self, x_BTD: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x_BTD = factor.matvec(x_BTD)
        return x_BTD

    @property
    def T(self) -> Product:
        return Product([factor.T for factor in reversed(self.factors)])

    def _dense(self) -> Tensor:
        matrices = [factor.dense() for factor in self.factors]
        total = matrices[-1]
        for matrix in reversed(matrices[:-1]):
            total = matrix @ total
        return total


class Sum(Operator):
    """A sum of operators, each times a number."""

    def __init__(self, terms: Sequence[Operator], factors: Sequence[float]) -> None:
        self.terms, self.factors = tuple(terms), tuple(factors)
        self.rows, self.cols = self.terms[0].rows, self.terms[0].cols

    @property
    def batch(self) -> int | None:
        return next((term.batch for term in self.terms if term.batch), None)

    def matvec(self, x_BTD: Tensor) -> Tensor:
        total = self.factors[0] * self.terms[0].matvec(x_BTD)
        for factor, term in zip(self.factors[1:], self.terms[1:], strict=True):
            total = total + factor * term.matvec(x_BTD)
        return total

    @property
    def T(self) -> Sum:
        return Sum([term.T for term in self.terms], self.factors)

    def _dense(self) -> Tensor:
        total = self.factors[0] * self.terms[0].dense()
        for factor, term in zip(self.factors[1:], self.terms[1:], strict=True):
            total = total + factor * term.dense()
        return total


@dataclass(frozen=True)
class Affine:
    """x ↦ W x + θ, with W and θ that may have been computed from an input.

    Attributes:
        operator: W.
        offset: θ, (B, R, E), or broadcast to it.

    >>> shift = Affine(identity((3, 4)), torch.ones(3, 4))
    >>> bool(torch.equal(shift.after(shift)(torch.zeros(2, 3, 4)), torch.full((2, 3, 4), 2.0)))
    True
    """

    operator: Operator
    offset: Tensor

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """W x + θ of states (…, B, T, D)."""
        return self.operator.matvec(x_BTD) + self.offset

    def after(self, other: Affine) -> Affine:
        """The map that applies `other` first. Two sums of Kronecker products make one again."""
        mine, theirs = self.operator, other.operator
        if isinstance(mine, Kronecker) and isinstance(theirs, Kronecker):
            operator: Operator = mine.times(theirs)
        else:
            operator = mine @ theirs
        offset = other.offset.expand(*other.offset.shape[:-2], *theirs.rows)
        return Affine(operator, mine.matvec(offset) + self.offset)

    def under(self, operator: Operator) -> Affine:
        """The map with a linear operator behind it."""
        offset = self.offset.expand(*self.offset.shape[:-2], *self.operator.rows)
        return Affine(operator @ self.operator, operator.matvec(offset))
