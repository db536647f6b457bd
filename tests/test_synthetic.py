"""Sequences made by a rule: what is drawn, real training runs on them, and what attention can do that static mixing
cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paradepth
from commands import answer
from paradepth.cli import main
from paradepth.data import ByteTokenizer
from paradepth.data.seeds import generator
from paradepth.data.synthetic import SEQUENCE_NAMES, SequenceData, draw_sequences
from paradepth.distributed import World
from paradepth.models import generate
from paradepth.recipes import get_recipe
from paradepth.train import Config, resume_run, start_run
from paradepth.train.step import IGNORED
from paradepth.train.tasks import load_data, task_class
from runs import Stop, events, stop_at


def answers(name: str, text: str, length: int) -> str:
    """The right answers, by the rule in plain Python."""
    given_text, asked = text.split("|")
    if name == "recall":
        pairs = dict(zip(given_text[::2], given_text[1::2], strict=True))
        assert len(pairs) == length
        assert sorted(asked[::2]) == sorted(pairs)
        return "".join(pairs[key] for key in asked[::2])
    symbols = given_text.replace(".", "")
    assert len(symbols) == length
    return "".join(sorted(symbols)) if name == "sorting" else symbols


@given(name=st.sampled_from(SEQUENCE_NAMES), length=st.integers(1, 26), seed=st.integers(0, 1000))
def test_answers_follow_the_rule(name: str, length: int, seed: int) -> None:
    tokens_BN, answer_N = draw_sequences(name, length, 3, draws=generator(seed, "a test"))
    assert tokens_BN.shape[1] == SequenceData(name, length).tokens + 1
    for tokens_N in tokens_BN:
        text = bytes(tokens_N.tolist()).decode("ascii")
        assert bytes(tokens_N[answer_N].tolist()).decode("ascii") == answers(name, text, length)
    if name == "copying_fixed":
        assert bool((tokens_BN[:, :length] != ord(".")).all())


def test_draws_are_functions_of_seed_split_and_place() -> None:
    data = SequenceData("recall", 4, seed=1)
    first, again, other = (data.training(0, batch, 8)[0] for batch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, data.training(1, 0, 8)[0])
    assert not torch.equal(first, SequenceData("recall", 4, seed=2).training(0, 0, 8)[0])
    tests = [SequenceData("recall", 4, seed=seed).held_out("test", 3, 9)[0] for seed in (1, 2)]
    assert torch.equal(*tests)
    assert torch.equal(tests[0], data.held_out("test", 0, 9)[0][3:])
    assert not torch.equal(tests[0], data.held_out("validation", 3, 9)[0])
    seen = {tuple(row) for batch in range(20) for row in data.training(0, batch, 64)[0].tolist()}
    assert not seen & {
        tuple(row) for split in ("validation", "test") for row in data.held_out(split, 0, 2000)[0].tolist()
    }


def test_processes_share_a_batch() -> None:
    task = load_data(Config().replace(model="gpt_nano", data="sorting", length=3, batch_size=8))
    whole = task.batches(World(0, 1, torch.device("cpu"))).get(2, 5)
    parts = [task.batches(World(rank, 2, torch.device("cpu"))).get(2, 5) for rank in (0, 1)]
    for i in (0, 1):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    assert int((whole[1] != IGNORED).sum()) == 8 * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "recall", "length": 27}, "length is 27; sequences of recall have a length between 1 and 26"),
        ({"data": "sorting", "length": 0}, "between 1 and 512"),
        ({"data": "recall", "context": 64}, "context is 64; sequences of recall of length 8 have 32 tokens"),
        ({"data": "recall", "train_fraction": 0.5}, "have no end"),
        ({"data": "recall", "tokenizer": "bpe"}, "tokenizer is 'bpe'; it means nothing to data 'recall'"),
        ({"data": "tiny_shakespeare", "length": 3}, "length is 3; it means nothing"),
        ({"data": "recall", "model": "bert_nano"}, "take one of gpt2, gpt_mini, gpt_nano"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    config = Config().replace(**{"model": "gpt_nano", **options})
    with pytest.raises(ValueError, match=words):
        task_class(config).load(config)


def small(name: str, **options: Any) -> Config:
    chosen = {"width": 32, "mlp": 64, "validations": 2, "precision": "float32", "threads": 1, **options}
    return get_recipe(name).replace(**chosen)


def test_a_run_of_branches_is_resumed_evaluated_reported_and_continues_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, broken = tmp_path / "run", tmp_path / "broken"
    config = small(
        "copying", length=3, branches=2, depth=1, schedule="one_pass", budget="30 steps", checkpoint_every=10
    )
    result = start_run(config, run)
    assert len(result["exact_accuracy"]) == len(result["accuracy"]) == 2
    with pytest.raises(Stop):
        start_run(config, broken, on_batch=stop_at(15))
    resume_run(broken)
    assert events(broken, "validation") == events(run, "validation")
    model = paradepth.from_pretrained(run)
    assert model.config.context == 9
    task = load_data(config, assets=run)
    told = task.details(model, "test")
    inputs, targets = task.ordered("test", 0, 300)
    predicted = model(inputs).argmax(dim=2)
    asked = targets != IGNORED
    right = (predicted == targets)[:, asked[0]]
    prompts = [bytes(row[:7].tolist()).decode() for row in inputs]
    made = generate(model, ByteTokenizer(), prompts, max_tokens=3, temperature=0.0)
    written = torch.tensor([one.tokens for one in made])
    assert torch.equal((written == targets[:, asked[0]]).all(dim=1), right.all(dim=1))
    assert told["examples"][0]["answers"] == ByteTokenizer().decode(targets[0, asked[0]].tolist())
    assert 0 <= told["exact_accuracy"][1] <= told["accuracy"][1]
    assert answer(capsys, "evaluate", run)["exact_accuracy"] == told["exact_accuracy"]
    assert main(["report", str(run), "--json"]) == 0
    page = (run / "report.html").read_text()
    assert "exact-sequence accuracy" in page
    assert "Sequences and answers" in page


def test_attention_recalls_what_static_mixing_does_not(tmp_path: Path) -> None:
    """Of two pairs the second key asked for is answered by the value that is left: 75 % without looking a key up."""
    options: dict[str, Any] = {"length": 2, "width": 64, "mlp": 256, "batch_size": 32, "budget": "800 steps"}
    found = {}
    for mixing in ("attention", "static"):
        config = small("recall", mixing=mixing, **options, decay="constant", validations=1)
        found[mixing] = start_run(config, tmp_path / mixing)["accuracy"][0]
    assert found["attention"] > 0.95
    assert found["static"] < 0.85
