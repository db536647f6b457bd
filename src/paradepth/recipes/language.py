"""Language modelling."""

from __future__ import annotations

from paradepth.train import Config


def shakespeare_gpt() -> Config:
    """Tiny Shakespeare by the byte: a GPT of 32 layers of width 128, step 1/28 between two buffer layers at each end.

    Expected: 34.6 % of the test text's bytes predicted right, loss 2.236 or 3.227 bits per byte (validation: 2.2222),
    after about 8 minutes on one CPU core.
    """
    return Config().replace(
        model="gpt_mini",
        data="tiny_shakespeare",
        validation_fraction=0.05,
        budget="600 steps",
        batch_size=16,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup=0.1,
        validations=6,
    )


def shakespeare_mgrit() -> Config:
    """`shakespeare_gpt`, its middle 28 layers solved by MGRIT as published: sampled coarse steps, F, one iteration.

    Expected: 34.5 % and loss 2.241 on the test text (validation: 2.2278, 0.25 % above serial) after about 15 minutes
    on one CPU core with `--recompute False`, a third longer without. ρ rises from 0.04 to 0.14 over the run and the
    gradient's cosine falls from 0.99999 to 0.998.
    """
    return shakespeare_gpt().replace(
        executor="mgrit",
        coarsening=4,
        relaxation="F",
        coarse="sample",
        forward_iterations=1,
        backward_iterations=1,
    )


def shakespeare_mgrit_control() -> Config:
    """`shakespeare_mgrit` under the controller: a probe every 25 steps, more iterations or serial where it must be.

    Expected: 34.5 % and loss 2.241 on the test text (validation: 2.2278, 0.25 % above serial) after about 15 minutes
    on one CPU core with `--recompute False`: ρ stays below 0.17, so the controller has nothing to do in 600 steps.
    """
    return shakespeare_mgrit().replace(control=True, probe_every=25, max_iterations=2, lipschitz=True)


def shakespeare_branch_sums() -> Config:
    """`shakespeare_mgrit_control` with two branch sums an interval as coarse steps (`half`).

    Expected: what serial training gives, 34.6 % and loss 2.236 on the test text (validation: 2.2222), after about 25
    minutes on one CPU core with `--recompute False`; the controller never changes anything.
    """
    return shakespeare_mgrit_control().replace(coarse="half")


def shakespeare_char() -> Config:
    """Tiny Shakespeare by the byte, trained to the end: a GPT of 6 layers of width 256, with dropout, by Muon.

    The budget is 10.6 passes over the text. Expected: loss 1.393 on the validation text, 58.0 % of its bytes predicted
    right, and 1.554 and 54.9 % on the test text, after 34 minutes on two CPU cores that multiply bf16.
    """
    return Config().replace(
        model="gpt_nano",
        width=256,
        heads=4,
        mlp=1024,
        depth=6,
        context=128,
        dropout=0.1,
        data="tiny_shakespeare",
        validation_fraction=0.05,
        budget="2600 steps",
        batch_size=32,
        optimiser="muon",
        learning_rate=2e-3,
        weight_decay=0.1,
        warmup=0.05,
        validations=13,
    )


def shakespeare_paraformer() -> Config:
    """Tiny Shakespeare by the byte: 4 branches of 2 layers of width 128, all prefixes trained in one pass.

    Expected: loss 1.997, 1.948, 1.923 and 1.917 on the test text with 1, 2, 3 and 4 branches, that is 2.88 to 2.77 bits
    per byte and 41.2 % to 43.4 % of the bytes predicted right (validation, 4 branches: 1.854), after about 24 minutes
    on a CPU core that three other runs shared.
    """
    return Config().replace(
        model="gpt_nano",
        width=128,
        heads=4,
        mlp=512,
        branches=4,
        depth=2,
        context=128,
        data="tiny_shakespeare",
        validation_fraction=0.05,
        schedule="one_pass",
        budget="600 steps",
        batch_size=32,
        optimiser="muon",
        learning_rate=2e-3,
        weight_decay=0.1,
        warmup=0.1,
        validations=6,
    )


def gpt2_openwebtext() -> Config:
    """GPT-2 at the published size for layer-parallel training, for a GPU cluster: 2 + 16 + 2 layers of width 768 on
    OpenWebText; forward pass serial, backward pass one MGRIT iteration.

    Not measured. A step takes about 3·10^14 FLOP, so the budget is some 8 hours on 8 GPUs that reach 10^15 FLOP a
    second together. OpenWebText has to lie in `--data-dir` as train-*.parquet; its last 5 % are the test text.
    Source: Layer-Parallel Training for Transformers (arXiv 2601.09026): two buffer layers at each end, h = 1/16 between
    them, batches of 256 texts of 1024 tokens, AdamW at 6e-4 with β .9 and .95, weight decay .1, 2000 steps of warm-up,
    cosine. The number of steps and the coarsening are not published; here they are 100,000 and 4. Documents are
    separated by a line break.
    """
    return Config().replace(
        model="gpt2",
        depth=20,
        step=1 / 16,
        buffers=(2, 2),
        data="text",
        validation_fraction=0.0005,
        tokenizer="hub:gpt2",
        executor="mgrit",
        levels=2,
        coarsening=4,
        relaxation="F",
        coarse="sample",
        forward_iterations="serial",
        backward_iterations=1,
        budget="100000 steps",
        batch_size=256,
        learning_rate=6e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        warmup=0.02,
        validations=50,
    )


def shakespeare_gpt2() -> Config:
    """`gpt2_openwebtext` at a size that trains here: 2 + 16 + 2 layers of width 128 on tiny Shakespeare, BPE of 1024
    tokens.

    Not measured to the end yet: 12.5 % of the validation text's tokens are predicted right, loss 5.485, after 100 of
    the 600 steps, whose speed makes some 8 minutes on one CPU core.
    """
    return gpt2_openwebtext().replace(
        width=128,
        heads=4,
        mlp=512,
        context=64,
        data="tiny_shakespeare",
        validation_fraction=0.05,
        tokenizer="bpe",
        vocab_size=1024,
        budget="600 steps",
        batch_size=16,
        learning_rate=1e-3,
        warmup=0.1,
        validations=6,
    )
