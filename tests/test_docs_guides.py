"""The Python examples of the guides run as printed, where they need a trained run with a small one in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import paradepth
from paradepth.data import ByteTokenizer, WordVocabulary
from test_docs import DOCS, PAGES, blocks

ELSEWHERE = {"index", "concepts", "getting-started", "extending", "grow", "parallelize", "studies"}  # have their own
PROCESSES = {"branch-parallel"}  # examples for torchrun; tests/branch_ranks.py does what they do
IMAGES = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "heads": 2, "mlp": 32}
TEXTS = {"vocab_size": 260, "context": 64, "width": 16, "heads": 2, "mlp": 32, "branches": 2, "depth": 1}


def run_of(place: str, model: str, **shape: Any) -> None:
    """What a finished run has for its users: an untrained model with its tokeniser or vocabulary."""
    tokens: Any = ByteTokenizer(special=True)
    if model.startswith("tagger"):
        tokens = WordVocabulary(["A", "to"], buckets=50)
        shape |= {"vocab_size": tokens.size, "features": tokens.features, "num_classes": 2, "class_names": ("A", "B")}
    if model.startswith("text"):
        shape |= {"num_classes": 2, "class_names": ("bad", "good")}
    tokens.save(paradepth.create_model(model, **{**TEXTS, **shape}).eval().save_pretrained(place))


def classified() -> dict[str, Any]:
    model = paradepth.create_model("paraformer_nano", **IMAGES).eval()
    images = torch.rand(20, 1, 8, 8)
    return {"model": model, "images": images, "validation_images": images, "validation_labels": torch.arange(20) % 10}


PREPARED: dict[str, Callable[[], Any]] = {
    "branch-executors": classified,
    "language": lambda: run_of("runs/para", "gpt_nano"),
    "masked": lambda: run_of("runs/bert", "bert_nano"),
    "classification": lambda: run_of("runs/sst2", "text_classifier_nano"),
    "tagging": lambda: run_of("runs/ewt_tagger", "tagger_nano"),
    "translation": lambda: run_of("runs/multi30k", "translator_nano"),
}


def pages() -> list[Path]:
    return [page for page in PAGES if blocks(page, "python") and page.stem not in ELSEWHERE | PROCESSES]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = PREPARED.get(page.stem, dict)() or {}
    code = blocks(page, "python")
    if page.stem == "export":  # its first example cuts a file that the second one writes
        exec(code.pop(), names)
        shutil.copy("model.onnx", "model-prefixes.onnx")
    for block in code:
        exec(block, names)


def test_examples_for_processes_are_python() -> None:
    for name in PROCESSES:
        for number, block in enumerate(blocks(DOCS / f"{name}.md", "python")):
            compile(block, f"{name}-{number}", "exec")
