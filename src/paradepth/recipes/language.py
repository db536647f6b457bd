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
