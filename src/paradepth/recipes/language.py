"""Language modelling."""

from __future__ import annotations

from paradepth.train import Config


def shakespeare_gpt() -> Config:
    """Tiny Shakespeare by the byte: a GPT of 32 layers of width 128, step 1/28 between two buffer layers at each end.

    Expected: 34.6 % of the test text's bytes predicted right, loss 2.236 or 3.227 bits per byte (validation: 35.3 %).
    Measured on one CPU core: 28 minutes beside other work; the first 30 steps of a run on a quiet machine took 23 s, so
    about 8 minutes there.
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
    """`shakespeare_gpt`, its middle 28 layers solved by MGRIT as published: sampled coarse steps, F, one iteration."""
    return shakespeare_gpt().replace(
        executor="mgrit",
        coarsening=4,
        relaxation="F",
        coarse="sample",
        forward_iterations=1,
        backward_iterations=1,
        recompute=False,
    )


def shakespeare_mgrit_control() -> Config:
    """`shakespeare_mgrit` under the controller: a probe every 25 steps, more iterations or serial where it must be."""
    return shakespeare_mgrit().replace(control=True, probe_every=25, max_iterations=2, lipschitz=True)


def shakespeare_branch_sums() -> Config:
    """`shakespeare_mgrit_control` with two branch sums an interval as coarse steps (`half`)."""
    return shakespeare_mgrit_control().replace(coarse="half")
