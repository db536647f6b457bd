"""What a paper says, and what our figures say about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["claim", "question"]
Answer = Literal["holds", "holds with conditions", "does not hold", "could not be tested here"]

PARAFORMER = "ParaFormer (arXiv 2510.15425)"
DUAT = "Dynamic UAT (arXiv 2407.21670)"
LAYER_PARALLEL = "Layer-parallel (arXiv 2601.09026)"
SOURCES = (PARAFORMER, DUAT, LAYER_PARALLEL)

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper that a study tests, or a question that it leaves open.

    Args:
        name: unique over all studies; lower-case words with dashes between them.
        text: one sentence; of a question, the question.
        source: the paper, one of `SOURCES`.
        kind: "claim" for what a paper asserts, "question" for what it leaves open.

    Raises:
        ValueError: a name of other letters, no text, an unknown source or kind.

    >>> Claim("accuracy-over-vit", "Branches beat a ViT by up to 2.39 points.", PARAFORMER).kind
    'claim'
    """

    name: str
    text: str
    source: str
    kind: Kind = "claim"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"claim name {self.name!r} is not allowed: lower-case words with dashes between them")
        if not self.text.strip():
            raise ValueError(f"claim {self.name} has no text")
        if self.source not in SOURCES:
            raise ValueError(f"claim {self.name}: source is {self.source!r}, but must be one of {', '.join(SOURCES)}")
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"claim {self.name}: kind is {self.kind!r}, but must be one of {', '.join(get_args(Kind))}"
            )


@dataclass(frozen=True)
class Verdict:
    """What figures say about a claim.

    Args:
        verdict: "holds", "holds with conditions", "does not hold" or "could not be tested here". Of a question it says
            whether the answer is yes.
        figure: our figures and, where there are some, the conditions, in a sentence or two.

    Raises:
        ValueError: another verdict, or no figure.
    """

    verdict: Answer
    figure: str

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Answer):
            raise ValueError(f"verdict is {self.verdict!r}, but must be one of {', '.join(get_args(Answer))}")
        if not self.figure.strip():
            raise ValueError(f"a verdict ({self.verdict}) needs the figures that it follows from")
