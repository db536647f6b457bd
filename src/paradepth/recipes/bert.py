"""Masked language modelling."""

from __future__ import annotations

from paradepth.train import Config


def bert_mini() -> Config:
    """A masked language model of 4 layers of width 128 on a text of your own (--data-dir), BPE of 8192 tokens.

    Expected: 11.5 % of the hidden tokens guessed right and loss 6.40 after 27 minutes on a CPU core that other runs
    shared, on 53 MB of English from Debian packages, mostly dictionaries (`benchmarks/masked_lm`).
    """
    return Config().replace(
        model="bert_mini",
        context=128,
        data="text",
        validation_fraction=0.02,
        tokenizer="bpe",
        vocab_size=8192,
        masking=0.15,
        budget="2800 steps",
        batch_size=16,
        optimiser="muon",
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup=0.06,
        validations=8,
    )


def bert_paraformer() -> Config:
    """A masked language model of 4 branches × 1 layer of width 128, stagewise, otherwise as `bert_mini`.

    Expected: 36.8 % of the hidden tokens guessed right and loss 3.70 (29.9, 36.5, 36.8, 36.8 % by prefix) after 29
    minutes of a CPU core, on the same corpus (`benchmarks/masked_lm`).
    """
    return bert_mini().replace(
        branches=4, depth=1, schedule="stagewise", masking=0.2, batch_size=32, budget="6000 steps"
    )


def bert_c4() -> Config:
    """BERT at the published size for layer-parallel pretraining, for a GPU cluster: 128 layers of width 768 on C4, by
    MGRIT with sampled coarse steps of 4 layers, one iteration each way.

    4·10^17 FLOP for every 10,000 steps, counted as serial ones: hours on a GPU cluster, not measured. C4's English
    part has to lie in `--data-dir` as train-*.parquet or .jsonl with a column `text`. Source: Layer-Parallel Training
    for Transformers (arXiv 2601.09026): 4 GPUs, width 768, 12 heads, batches of 32 texts of 224 tokens, AdamW at 5e-5
    with β .9 and .98, 20 % masking, weights initialised for depth. The number of steps is not published.
    """
    return Config().replace(
        model="bert_base",
        depth=128,
        context=224,
        deep_init=True,
        data="text",
        validation_fraction=0.001,
        tokenizer="bpe",
        vocab_size=30522,
        masking=0.2,
        executor="mgrit",
        levels=2,
        coarsening=4,
        relaxation="F",
        coarse="sample",
        forward_iterations=1,
        backward_iterations=1,
        control=True,
        probe_every=500,
        budget="100000 steps",
        batch_size=32,
        learning_rate=5e-5,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        warmup=0.05,
        validations=100,
    )
