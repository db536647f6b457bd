"""Translation."""

from __future__ import annotations

from paradepth.train import Config


def multi30k_transformer() -> Config:
    """Multi30k from German to English: 3 + 3 layers of width 128 and a BPE of 4,000 tokens for both languages.

    Expected: BLEU 38.5 and chrF 57.9 on the 2016 test split with 4 beams (37.1 and 56.9 greedily), loss 1.718, 66.4 %
    of the next tokens right, after 52 minutes on one of two CPU cores with bf16 units that other runs kept busy; about
    20 minutes on a free one.
    """
    return Config().replace(
        model="translator_mini",
        data="multi30k",
        languages=("de", "en"),
        vocab_size=4000,
        dropout=0.1,
        budget="10 epochs",
        batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup=0.08,
        label_smoothing=0.1,
        validations=10,
    )


def multi30k_paraformer() -> Config:
    """`multi30k_transformer` as a ParaFormer: 3 branches of 1 + 1 layers, each with an encoder of its own, stagewise.

    As many layers and parameters as the serial one, and 100 % of its layer evaluations in an epoch of all branches.
    BLEU is not measured yet; it should take about as many minutes as the serial one.
    """
    return multi30k_transformer().replace(branches=3, depth=1, schedule="stagewise")


def multi30k_mgrit() -> Config:
    """Multi30k with the published depth, 6 + 6 layers, as one chain that MGRIT solves in intervals of 3 layers.

    Two iterations forward and one backward, as published; the width is that of `multi30k_transformer`. An update
    evaluates 26 layers forward and 27 backward where a serial one has 12 and 12, which took 340 % of its time on one
    CPU core, where nothing runs in parallel: some 5 hours for the whole run there. BLEU is not measured yet.
    """
    return multi30k_transformer().replace(
        depth=6,
        executor="mgrit",
        levels=2,
        coarsening=3,
        relaxation="F",
        coarse="sample",
        forward_iterations=2,
        backward_iterations=1,
    )


def opus_published() -> Config:
    """Translation at the published size, for a GPU cluster: 6 + 6 layers of width 512 on OPUS German-English, by MGRIT.

    Not measured. 1.4·10^17 FLOP for these 160,000 steps, counted as serial ones: about 25 minutes at 10^14 FLOP a
    second, 10 % of what a data-centre GPU can do. The corpus has to lie in `--data-dir` as train.de and train.en.
    Source: Layer-Parallel Training for Transformers (arXiv 2601.09026): intervals of 3 layers, two iterations
    forward and one backward, batches of 8 pairs of up to 274 tokens, Adam at 5e-4 with inverse-square-root decay,
    8,000 steps of warm-up, label smoothing 0.1. What it does not state (steps, vocabulary, dropout) is chosen here.
    """
    return Config().replace(
        model="translator_base",
        data="pairs",
        languages=("de", "en"),
        validation_fraction=0.005,
        vocab_size=32_000,
        dropout=0.1,
        executor="mgrit",
        levels=2,
        coarsening=3,
        relaxation="F",
        coarse="sample",
        forward_iterations=2,
        backward_iterations=1,
        control=True,
        probe_every=500,
        budget="160000 steps",
        batch_size=8,
        learning_rate=5e-4,
        weight_decay=0.0,
        warmup=0.05,  # 8,000 steps
        decay="inverse_sqrt",
        label_smoothing=0.1,
        validations=40,
    )
