"""What the tests of tagging share: sentences whose tags follow a rule, and a small configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from paradepth.train import Config


def rows(*words: tuple[str, str, str]) -> str:
    """One sentence of CoNLL-U, of words with their parts of speech and features."""
    lines = [f"{i}\t{word}\t_\t{upos}\t_\t{f}\t0\troot\t_\t_" for i, (word, upos, f) in enumerate(words, start=1)]
    return "\n".join(lines) + "\n\n"


def grammar(count: int, seed: int, *, most: int = 3) -> str:
    """Sentences whose tags follow from the ends of words and from the word before."""
    draws = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=draws))]

    text = ""
    for number in range(count):
        words = []
        for _ in range(1 + int(torch.randint(most, (), generator=draws))):
            stem = "".join(pick("abdegiklmnoprstu") for _ in range(3))
            plural = pick(["s", ""])
            words.append((pick(["the", "a"]), "DET", "PronType=Art"))
            words.append((stem + "ion" + plural, "NOUN", "Number=Plur" if plural else "Number=Sing"))
            words.append((stem + "ize" + plural, "VERB", "_" if plural else "VerbForm=Fin"))
        words.append((".", "PUNCT", "_"))
        text += f"# sent_id = {number}\n" + rows(*words)
    return text


def config(corpus: Path, **options: Any) -> Config:
    """Two small branches on a treebank for 40 steps; `options` replace anything."""
    small: dict[str, Any] = {
        "model": "tagger_nano",
        "branches": 2,
        "depth": 1,
        "width": 16,
        "mlp": 16,
        "context": 8,
        "data": "conllu",
        "data_dir": corpus,
        "word_dropout": 0.2,
        "dropout": 0.1,
        "schedule": "one_pass",
        "budget": "40 steps",
        "batch_size": 16,
        "learning_rate": 1e-2,
        "validations": 4,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return Config().replace(**{**small, **options})
