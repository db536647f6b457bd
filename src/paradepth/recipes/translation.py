"""Translation."""

from __future__ import annotations

from paradepth.train import Config


def multi30k_transformer() -> Config:
    """Multi30k from German to English: 3 encoder and 3 decoder layers of width 128, one BPE of 5,000 tokens."""
    return Config().replace(
        model="translator_mini",
        data="multi30k",
        languages=("de", "en"),
        vocab_size=5000,
        dropout=0.2,
        budget="30 epochs",
        batch_size=128,
        learning_rate=3e-3,
        weight_decay=0.01,
        warmup=0.05,
        decay="inverse_sqrt",
        label_smoothing=0.1,
        validations=20,
    )
