"""Tagging."""

from __future__ import annotations

from paradepth.train import Config


def ewt_tagger() -> Config:
    """UD English EWT, parts of speech: 4 layers of width 128 in series, no pretraining.

    Expected: 94.7 % of the test split's words right (validation 94.6 %), after 2 to 5 minutes on one CPU core, by how
    busy it is. With `--tags features` 95.4 % (94.9 %), with `--tags both` 93.0 % (92.6 %): 94.9 % of the parts of
    speech and 95.3 % of the features.
    """
    return Config().replace(
        model="tagger_mini",
        data="ud_english_ewt",
        tags="upos",
        word_dropout=0.2,
        dropout=0.2,
        budget="3 epochs",
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=0.1,
        warmup=0.1,
        validations=3,
    )


def ewt_paraformer() -> Config:
    """`ewt_tagger` with 4 branches of one layer each in place of 4 layers in series, schedule `one_pass`.

    Expected: 94.8, 94.9, 94.9, 94.8 % of the test split's words right by prefix (validation 94.4 to 94.5 %), after 2 to
    7 minutes on one CPU core, by how busy it is: what the serial tagger has, already with one branch.
    """
    return ewt_tagger().replace(branches=4, depth=1, schedule="one_pass")


def ewt_mgrit() -> Config:
    """UD English EWT, parts of speech: 12 layers of width 64, the middle 8 solved by MGRIT, two levels, c = 2.

    Expected: 93.95 % of the test split's words right (validation 93.59 %), loss 0.2035, after one epoch, about 4
    minutes on one CPU core. `--executor serial` gives 93.91 % (93.58 %), loss 0.2035.
    """
    return ewt_tagger().replace(
        model="tagger_deep",
        executor="mgrit",
        levels=2,
        coarsening=2,
        relaxation="F",
        coarse="sample",
        forward_iterations=2,
        backward_iterations=1,
        recompute=False,
        budget="1 epoch",
    )


def mc_gum_published() -> Config:
    """UD English GUM at the published size: 64 layers of width 128, sequences of 2048 words, MGRIT with c = 2.

    For several GPUs, some hours: 163 GFLOP for the forward pass over one sequence. Not measured: the paper states the
    same validation accuracy as serial training, in %, on 1 to 8 GPUs, and neither the step nor the number of epochs.
    """
    return Config().replace(
        model="tagger_gum",
        data="ud_english_gum",
        tags="upos",
        pack=True,
        executor="mgrit",
        levels=2,
        coarsening=2,
        relaxation="F",
        coarse="sample",
        forward_iterations=2,
        backward_iterations=1,
        budget="100 epochs",
        batch_size=8,
        optimiser="sgd",
        learning_rate=1e-2,
        momentum=0.9,
        weight_decay=0.0,
        warmup=0.0,
        decay="constant",
    )
