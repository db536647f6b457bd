"""Every claim of the three papers and every question that they leave open, with our answer: `docs/claims.md`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from paradepth.studies import STUDIES, get_study
from paradepth.studies.claim import SOURCES, Answer, Claim, Verdict
from paradepth.studies.claims.branches import BRANCH_CLAIMS
from paradepth.studies.claims.compression import COMPRESSION_CLAIMS
from paradepth.studies.claims.layers import LAYER_CLAIMS
from paradepth.studies.collect import collect

BENCHMARKS = (*BRANCH_CLAIMS, *COMPRESSION_CLAIMS, *LAYER_CLAIMS)

# What the papers claim or leave open, by subject; each subject needs a claim.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "accuracy": ("accuracy-over-vit", "joint-is-worse-than-serial", "branches-on-texts"),
    "progressive approximation": ("each-branch-lowers-the-residual", "progressive-beats-joint", "when-to-add-a-branch"),
    "rates of approximation": ("greedy-rate", "progressive-branches-differ"),
    "convergence speed": ("convergence-speed",),
    "shapes": ("balanced-shapes-win", "least-latency-costs-accuracy"),
    "stability over seeds and initialisations": ("stability-over-seeds", "stability-over-initialisations"),
    "compression": ("compression-at-minimal-loss", "compression-at-most", "quantisation-and-pruning"),
    "expansion": ("expansion-for-continual-learning",),
    "device speed-up": ("faster-than-fairscale", "devices-for-branches", "depth-on-equal-devices"),
    "constant latency in the number of branches": ("constant-latency",),
    "fused execution of branches": ("fused-branches",),
    "closed form": ("block-is-dual-closed-form",),
    "relaxed attention": ("relaxed-attention", "relaxed-after-training"),
    "input-dependent coefficients": ("input-dependent-coefficients", "conditional-compute"),
    "parameter sharing": ("parameter-sharing-ablation", "parameter-sharing-efficiency"),
    "overhead of input dependence": ("overhead-of-input-dependence",),
    "number of parallel layers": ("more-parallel-layers-are-better", "nothing-lost-on-known-functions"),
    "fine-tuning transfer": ("fine-tuning-transfer", "branches-transfer-better"),
    "branch sum against serial stack": (
        "parallel-layers-lose-nothing",
        "serial-stack-becomes-branches",
        "interval-error-predicts-first-guess",
    ),
    "layer-parallel accuracy per task": (
        "layer-parallel-tagging",
        "layer-parallel-translation",
        "vit-needs-the-switch",
    ),
    "indicator and switch": (
        "indicator-tells-the-bias",
        "language-models-need-the-switch",
        "switching-in-both-directions",
    ),
    "buffers": ("buffer-layers", "ends-stiffen-first"),
    "layer-parallel speed-up": ("two-devices-may-be-slower", "layer-parallel-speed-up"),
    "bias of gradients": ("gradient-bias",),
    "composition with data parallelism": ("composition-with-data-parallelism",),
    "size of the data set": ("scaling-over-data",),
    "memory": ("memory-of-layer-parallel-training",),
    "coarsening, levels and iterations": ("choice-of-coarse-solver",),
    "GLUE differences": ("glue-differences", "downstream-accuracy"),
}


@dataclass(frozen=True)
class Row:
    """A claim with what was found.

    Attributes:
        claim: the claim.
        verdict: the verdict, or None as long as its study has not been run to the end.
        title: of the page that has the details.
        link: that page, relative to the repository.
        command: makes the figures again.
    """

    claim: Claim
    verdict: Verdict | None
    title: str
    link: str
    command: str


def rows(root: Path) -> list[Row]:
    """A row for each claim: those of the studies, in their order, then those that benchmarks answer.

    Args:
        root: the repository.

    Raises:
        ValueError: two claims of one name, or figures that cannot be read.
    """
    found = []
    for name in STUDIES:
        study, folder = get_study(name), root / "studies" / name
        results = collect(study, folder)
        for claim, result in zip(study.claims, results["claims"], strict=True):
            verdict = Verdict(result["verdict"], result["figure"]) if result["verdict"] else None
            report = f"studies/{name}/report.html"
            found.append(Row(claim, verdict, f"study {name}", report, results["command"]))
    for source in BENCHMARKS:
        folder = root / "benchmarks" / source.benchmark
        verdict = source.verdict(*(json.loads((folder / file).read_bytes()) for file in source.files))
        link = f"benchmarks/{source.benchmark}/README.md"
        found.append(Row(source.claim, verdict, f"benchmark {source.benchmark}", link, source.command))
    names = [row.claim.name for row in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"claims of the same name: {', '.join(twice)}")
    return found


def page(root: Path) -> str:
    """`docs/claims.md`, from the figures that lie in the repository."""
    found = rows(root)
    lines = [
        "# Claims",
        "",
        "What the three papers claim, what they leave open, and what was measured here. Verdicts follow from the",
        "figures beside them by rules that the studies state; of an open question a verdict says whether the answer is",
        "yes. Figures are of small networks on two CPU cores: a claim that does not hold here may hold at the papers'",
        "sizes, which `paradepth study NAME --size paper` has.",
        "",
        "This page is made by `make claims` from the results in `studies/` and `benchmarks/`.",
        "",
        "| | claims | open questions |",
        "|---|---|---|",
    ]
    for answer in (*get_args(Answer), None):
        counts = [
            sum(1 for row in found if row.claim.kind == kind and (row.verdict and row.verdict.verdict) == answer)
            for kind in ("claim", "question")
        ]
        if any(counts):
            lines.append(f"| {answer or 'not run yet'} | {counts[0]} | {counts[1]} |")
    for source in SOURCES:
        for kind, title in (("claim", "claims"), ("question", "open questions")):
            of_kind = [row for row in found if (row.claim.source, row.claim.kind) == (source, kind)]
            if of_kind:
                lines += [
                    "",
                    f"## {source}: {title}",
                    "",
                    "| claim | verdict | our figures | from |",
                    "|---|---|---|---|",
                ]
                lines += [_line(row) for row in of_kind]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    verdict = f"**{row.verdict.verdict}**" if row.verdict else "not run yet"
    figure = row.verdict.figure if row.verdict else ""
    title = f"[{row.title}](../{row.link})" if row.verdict else row.title  # there is no report yet
    where = f"{title}, `{row.command}`"
    cells = (row.claim.text, verdict, figure, where)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
