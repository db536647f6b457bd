"""Mixing tokens by a linear map that does not depend on the input, in place of attention.

    attention        y_h = A_h(x) V_h(x),   A_h(x) = softmax(Q_h(x) K_h(x)ᵀ / √K)      D² each for Q and K
    static mixing    y_h = M_h V_h(x)                                                  T² for each head

Value and output projections are those of attention. M_h is free: its rows may have any sign and any sum. Among static
maps that contains the averages that softmax could give, and it makes the best one a least-squares problem with a closed
form, so that what is lost against attention is lost to the missing dependence on the input and to nothing else.

Shapes: B batch, T tokens, S tokens mixed (T of them new), N tokens of the matrix, D width, H heads, K width of a head,
R rank.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from paradepth.nn.attention import _head_width
from paradepth.nn.cache import KeyValueCache
from paradepth.nn.dropout import Dropout

Mixing = Literal["attention", "static"]


def check_mixing(mixing: str) -> None:
    """Refuses an unknown way of mixing tokens.

    Raises:
        ValueError: naming those that there are.
    """
    if mixing not in get_args(Mixing):
        raise ValueError(f"mixing is {mixing!r}; it must be one of {', '.join(get_args(Mixing))}")


class StaticMixing(nn.Module):
    """Each head mixes the values of all tokens by one learned N × N matrix, the same for every input.

    A text shorter than N uses the first rows and columns, as it uses the first embeddings of positions; a longer one is
    refused. Tokens that a mask hides count as zero, and what is left is not scaled up, since the rows are no averages:
    a text's own tokens come out the same with and without padding behind them.

    Sources: the Random Synthesizer of Synthesizer: Rethinking Self-Attention (arXiv 2005.00743) has static matrices
    inside a softmax; token mixing without one is that of MLP-Mixer (arXiv 2105.01601).

    Args:
        width: D.
        heads: H; must divide `width` unless `head_width` is given.
        tokens: N, the most tokens of a sample.
        head_width: K; None is D / H.
        rank: R of a factorised matrix, M_h = L_h R_h with N × R and R × N; None has a full one. For texts so long that
            H·N² is far more than attention's parameters.
        bias: whether the projections have biases.
        attention_dropout: dropout probability of the entries of the matrices, drawn for each sample.
        causal: a token sees itself and the ones before it only; the other half of the matrices is not used.

    Raises:
        ValueError: `heads` does not divide `width`, or a number below 1.

    >>> mix = StaticMixing(64, 4, tokens=10)
    >>> mix(torch.randn(2, 10, 64)).shape, mix.matrix(7).shape
    (torch.Size([2, 10, 64]), torch.Size([4, 7, 7]))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        tokens: int,
        head_width: int | None = None,
        rank: int | None = None,
        bias: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("tokens", tokens), ("rank", rank)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.heads = heads
        self.head_width = _head_width(width, heads, head_width)
        self.tokens = tokens
        self.rank = rank
        self.causal = causal
        inner = heads * self.head_width
        self.value = nn.Linear(width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)
        if rank is None:
            self.mixing = nn.Parameter(torch.empty(heads, tokens, tokens))
        else:
            self.left = nn.Parameter(torch.empty(heads, tokens, rank))
            self.right = nn.Parameter(torch.empty(heads, rank, tokens))
        self.attention_dropout = Dropout(attention_dropout)
        self.reset_mixing_()

    @torch.no_grad()
    def reset_mixing_(self) -> None:
        """Draws the matrices: each row an average over the tokens that it sees, as attention starts, and noise of the
        same norm, which tells the heads apart."""
        seen_N1 = torch.full((self.tokens, 1), float(self.tokens))
        if self.causal:
            seen_N1 = torch.arange(1.0, self.tokens + 1)[:, None]
        if self.rank is None:
            self.mixing.normal_().div_(seen_N1.sqrt()).add_(1 / seen_N1)
            if self.causal:
                self.mixing.tril_()
            return
        self.left.normal_().mul_((self.tokens / seen_N1 / self.rank).sqrt())
        self.right.normal_().div_(self.tokens**0.5)

    def matrix(self, tokens: int | None = None, *, start: int = 0) -> Tensor:
        """M, rows `start` to `tokens` of the first `tokens` columns, (H, tokens − start, tokens); zero where a token
        may not look.

        Raises:
            ValueError: more tokens than the matrix has.
        """
        S = self.tokens if tokens is None else tokens
        self._check_tokens(S)
        if self.rank is None:
            m_HTS = _part(_part(self.mixing, 1, start, S), 2, 0, S)
        else:
            m_HTS = _part(self.left, 1, start, S) @ _part(self.right, 2, 0, S)
        return m_HTS.tril(start) if self.causal else m_HTS

    def _check_tokens(self, tokens: int) -> None:
        if tokens > self.tokens:
            raise ValueError(f"there are {tokens} tokens, and the static mixing is a matrix of {self.tokens}")

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Mixes all tokens into every token, or the ones up to it when causal.

        Args:
            x_BTD: input.
            mask: booleans that broadcast to (B, H, T, S); True lets a token be seen.
            cache: values of the tokens before these, which are mixed in as well; it takes up these.

        Returns:
            (B, T, D).

        Raises:
            ValueError: more tokens than the matrix has.
        """
        B, T, _ = x_BTD.shape
        v_BSHK = self.value(x_BTD).view(B, T, self.heads, self.head_width)
        if cache is not None:
            v_BHTK = v_BSHK.transpose(1, 2)
            v_BSHK = cache.extend(v_BHTK[..., :0], v_BHTK)[1].transpose(1, 2)  # there are no keys
        S = v_BSHK.shape[1]
        if mask is not None and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:  # the same for every query
            v_BSHK = v_BSHK * mask[:, 0, 0, :, None, None]
            mask = None
        drops = self.attention_dropout.p > 0.0 and self.attention_dropout.training
        if mask is not None or drops:
            m_BHTS = self.matrix(S, start=S - T).expand(B, -1, -1, -1)
            m_BHTS = self.attention_dropout(m_BHTS if mask is None else m_BHTS * mask)
            y_BTHK = torch.einsum("bhts,bshk->bthk", m_BHTS, v_BSHK)
        elif self.rank is None or self.causal:
            # One product for all samples: the matrices are not copied for each.
            y_BTHK = torch.einsum("hts,bshk->bthk", self.matrix(S, start=S - T), v_BSHK)
        else:
            self._check_tokens(S)
            r_BRHK = torch.einsum("hrs,bshk->brhk", _part(self.right, 2, 0, S), v_BSHK)
            y_BTHK = torch.einsum("htr,brhk->bthk", _part(self.left, 1, 0, S), r_BRHK)
        return self.out(y_BTHK.reshape(B, T, self.heads * self.head_width))

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two). Factors of a
        causal matrix are multiplied out first, which is counted as if for this sample alone."""
        inner, width = self.out.in_features, self.out.out_features
        projections = 2 * tokens * 2 * width * inner
        if self.rank is None:
            return projections + 2 * tokens * tokens * inner
        if self.causal:
            return projections + 2 * tokens * tokens * (inner + self.heads * self.rank)
        return projections + 4 * tokens * self.rank * inner


def _part(tensor: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """A view of places start … stop − 1; a copy where a graph is made for any number of tokens, since torch tells one
    layout of a view's memory from another there, and that depends on the number."""
    if torch.compiler.is_compiling():
        return tensor.index_select(dim, torch.arange(start, stop, device=tensor.device))
    return tensor.narrow(dim, start, stop - start)


def mixing_parameters(
    width: int, heads: int, *, tokens: int, rank: int | None = None, bias: bool = True
) -> tuple[int, int]:
    """Parameters that tell where a token looks: attention's queries and keys, and static mixing's matrices, for heads
    of width D / H.

    Of a causal matrix the half above the diagonal, which is never used, counts as well. The two are equal where
    H·T² = 2·D·(D + 1).

    >>> mixing_parameters(64, 2, tokens=64, bias=False)
    (8192, 8192)
    """
    inner = heads * _head_width(width, heads, None)
    return 2 * inner * (width + bias), heads * tokens * (tokens if rank is None else 2 * rank)


def equal_mlp(mlp: int, width: int, heads: int, *, tokens: int, rank: int | None = None, bias: bool = True) -> int:
    """The hidden width of the feed-forward part that gives a layer with static mixing as many parameters as one with
    attention has with `mlp`: what the matrices save or cost is made up for there, up to one hidden neuron's.

    Raises:
        ValueError: the matrices alone have too many parameters; a rank makes them smaller.

    >>> equal_mlp(256, 64, 2, tokens=64, bias=False), equal_mlp(256, 64, 2, tokens=49), equal_mlp(256, 64, 2, tokens=96)
    (256, 283, 178)
    """
    attention, static = mixing_parameters(width, heads, tokens=tokens, rank=rank, bias=bias)
    wanted = mlp + round((attention - static) / (2 * width + bias))
    if wanted < 1:
        raise ValueError(
            f"static mixing of {tokens} tokens by {heads} heads has {static} parameters, and attention's queries and "
            f"keys {attention}: there is no hidden width that makes up for it; take a rank"
        )
    return wanted


def equal_shape(width: int, heads: int, mlp: int, tokens: int) -> dict[str, int | None]:
    """Rank and hidden width of static mixing with as many parameters as attention: full matrices while they have no
    more than queries and keys, else factorised ones of the largest rank that has no more; what is left goes into the
    feed-forward part.

    >>> equal_shape(64, 2, 256, 49), equal_shape(64, 2, 256, 1024)
    ({'mixing_rank': None, 'mlp': 283}, {'mixing_rank': 2, 'mlp': 257})
    """
    attention, full = mixing_parameters(width, heads, tokens=tokens)
    rank = None if full <= attention else max(1, attention // (2 * heads * tokens))
    return {"mixing_rank": rank, "mlp": equal_mlp(mlp, width, heads, tokens=tokens, rank=rank)}
