"""Masked language models: padding, prefixes and masking against oracles; runs from a text file to a guessed word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import paradepth
from commands import answer
from paradepth.cli import main
from paradepth.data.masking import IGNORED, Masking
from paradepth.data.padded import PaddedBatches, Ragged
from paradepth.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer, with_specials
from paradepth.depth import MGRIT, Serial
from paradepth.models import MaskedLM, fill_mask, from_pretrained
from paradepth.nn import MaskedLMHead
from paradepth.train import Config, resume_run, start_run
from paradepth.train.schedules import Objective
from paradepth.train.step import IGNORED as LOSS_IGNORES
from paradepth.train.step import TrainStep
from paradepth.train.tasks import load_data, task_class
from runs import Stop, events, stop_at

PAD, FIRST, LAST, MASK = range(4)
trunks = st.sampled_from(
    [
        {"depth": 3},
        {"depth": 3, "step": 0.5, "buffers": (1, 1)},
        {"branches": 3, "depth": 1},
        {"branches": 2, "depth": 2, "aggregate": "sum"},
    ]
)


def bert(**options: Any) -> MaskedLM:
    small = {"vocab_size": 19, "pad": PAD, "context": 9, "width": 8, "heads": 2, "mlp": 16}
    return paradepth.create_model("bert_nano", **{**small, **options}).double().eval()


def texts(lengths: list[int]) -> Tensor:
    """Padded texts of these lengths."""
    rows = [torch.cat([torch.randint(4, 19, (n,)), torch.full((max(lengths) - n,), PAD)]) for n in lengths]
    return torch.stack(rows)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ---- the model ---------------------------------------------------------------------------------------------------


@given(trunk=trunks, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_padding_changes_nothing(trunk: dict, lengths: list[int]) -> None:
    model, tokens_BT = bert(**trunk), texts(lengths)
    together, shares = model.prefix_logits(tokens_BT), model.contributions(tokens_BT)
    assert together.shape == (model.prefixes, len(lengths), max(lengths), 19)
    for row, length in enumerate(lengths):
        alone = tokens_BT[row : row + 1, :length]
        close(together[:, row, :length], model.prefix_logits(alone)[:, 0])
        close(shares[:, row], model.contributions(alone)[:, 0])


def test_padding_is_seen_without_the_mask() -> None:
    model, tokens_BT = bert(depth=2), texts([3, 6])
    states = model.trunk(model.stem(tokens_BT))
    assert not torch.allclose(model.decode(states, tokens_BT)[0, :3], model(tokens_BT)[0, :3], atol=1e-6)


@given(trunk=trunks)
def test_prefix_k_is_the_truncated_model_and_places_pick_logits(trunk: dict) -> None:
    model, tokens_BT = bert(**trunk), texts([5, 9, 2])
    places_BP = torch.tensor([[0, 4], [8, 8], [1, 0]])
    logits = model.prefix_logits(tokens_BT)
    picked = model.prefix_logits((tokens_BT, places_BP))
    close(picked, torch.stack([row[:, place] for row, place in zip(logits.unbind(1), places_BP, strict=True)], dim=1))
    for k in range(1, model.prefixes + 1):
        close(model((tokens_BT, places_BP), branches=k), picked[k - 1])
        if model.config.branches:
            close(model.truncate(k)(tokens_BT), logits[k - 1])


def test_converged_mgrit_is_serial_with_a_padding_mask() -> None:
    model, tokens_BT = bert(depth=8), texts([3, 9])
    outcomes = []
    for executor in (Serial(), MGRIT(coarsening=2, relaxation="F", forward_iterations=4, backward_iterations=4)):
        model.trunk.executor = executor
        model.zero_grad()
        logits = model(tokens_BT)
        (logits * (tokens_BT != PAD)[..., None]).square().sum().backward()
        outcomes.append([logits[0, :3], logits[1], *(p.grad.clone() for p in model.parameters())])  # pyright: ignore
    for serial, parallel in zip(*outcomes, strict=True):
        close(serial, parallel)


def test_head_is_berts_and_shares_its_weight_with_the_stem() -> None:
    model = bert(depth=1)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    head = model.head
    h = head.transform_norm(F.gelu(head.transform(head.norm(x))))
    close(head(x), h @ model.stem.embed.weight.T + head.bias)
    assert "head.vocabulary.weight" not in model.state_dict()
    assert bert(depth=1, tied=False).state_dict()["head.vocabulary.weight"].shape == (19, 8)
    assert MaskedLMHead(8, 19).flops(3) == 2 * 3 * (8 * 19 + 8 * 8)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.tensor([[5, 6], [PAD, PAD]]), "text 1 of the batch is nothing but padding"),
        (torch.full((1, 10), 5), "1 to 9"),
        (torch.full((1, 3), 19), "vocabulary is 0 to 18"),
    ],
)
def test_tokens_that_make_no_sense_are_refused(tokens: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bert(depth=1)(tokens)
    with pytest.raises(ValueError, match="pad is 19"):
        bert(depth=1, pad=19)


# ---- masking -----------------------------------------------------------------------------------------------------


def masked(tokens_BT: Tensor, rate: float = 0.2, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    masking = Masking(rate, mask=MASK, vocab_size=1000, special=(PAD, FIRST, LAST, MASK))
    return masking(tokens_BT, **{"seed": 0, "purpose": "test", "numbers": (7,), "first": 0, **options})


def test_masking_hides_a_fifth_by_80_10_10() -> None:
    source = torch.randint(4, 1000, (400, 100))
    hidden, places, targets = masked(source)
    assert places.shape == (400, 20)
    assert (places.diff(dim=1) > 0).all()
    assert torch.equal(source.gather(1, places), targets)
    others = torch.ones_like(source, dtype=torch.bool).scatter(1, places, False)
    assert torch.equal(hidden[others], source[others])
    now = hidden.gather(1, places)
    assert (now == MASK).double().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (now == targets).double().mean().item() == pytest.approx(0.1, abs=0.015)
    random = now[(now != MASK) & (now != targets)]
    assert random.min() >= 4
    assert random.double().mean().item() == pytest.approx(502, abs=40)
    spread = places.double().mean().item()
    assert spread == pytest.approx(49.5, abs=2)  # every place is as likely as the others


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), first=st.integers(0, 50))
def test_masking_of_a_text_depends_on_its_number_alone(lengths: list[int], first: int) -> None:
    rows = [torch.cat([torch.tensor([FIRST]), torch.randint(4, 1000, (n,)), torch.tensor([LAST])]) for n in lengths]
    together = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    hidden, places, targets = masked(together, first=first)
    for i, row in enumerate(rows):
        alone = masked(row[None], first=first + i)
        counted = targets[i] != IGNORED
        assert int(counted.sum()) == max(1, round(0.2 * lengths[i]))
        assert torch.equal(hidden[i, : len(row)], alone[0][0])
        assert torch.equal(places[i, counted], alone[1][0])
        assert torch.equal(targets[i, counted], alone[2][0])
        assert (targets[i, counted] >= 4).all()
        assert torch.equal(hidden[i, len(row) :], together[i, len(row) :])


def test_masking_changes_with_seed_step_and_number() -> None:
    source = torch.randint(4, 1000, (1, 60))
    different: tuple[dict[str, Any], ...] = ({}, {"seed": 1}, {"numbers": (8,)}, {"first": 1}, {"purpose": "other"})
    seen = {tuple(masked(source, **options)[1][0].tolist()) for options in different}
    assert len(seen) == 5
    assert torch.equal(masked(source)[1], masked(source)[1])


def test_masking_that_makes_no_sense_is_refused() -> None:
    for rate in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"masking is {rate}"):
            masked(torch.full((1, 4), 5), rate)
    with pytest.raises(ValueError, match="text 3 has no ordinary token"):
        masked(torch.tensor([[FIRST, LAST, PAD]]), first=3)


def test_only_hidden_tokens_count_in_the_loss() -> None:
    assert IGNORED == LOSS_IGNORES
    model = bert(depth=1).float()
    tokens, places = texts([6, 6]), torch.tensor([[1, 3], [2, 0]])
    targets = torch.tensor([[7, 8], [9, IGNORED]])
    loss, hits = TrainStep(model)((tokens, places), targets, Objective(1))
    log_p = model(tokens).log_softmax(dim=-1)
    wanted = -(log_p[0, 1, 7] + log_p[0, 3, 8] + log_p[1, 2, 9]) / 3
    torch.testing.assert_close(loss, wanted)
    best = [log_p[0, 1].argmax() == 7, log_p[0, 3].argmax() == 8, log_p[1, 2].argmax() == 9]
    assert int(hits) == sum(map(int, best))


# ---- batches of similar lengths ------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 20), min_size=4, max_size=40),
    batch=st.sampled_from([2, 4]),
    stretch=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_padded_batches_are_a_shuffle_and_ranks_share_them(
    lengths: list[int], batch: int, stretch: int, drop_last: bool
) -> None:
    ragged = Ragged.of([[i] * n for i, n in enumerate(lengths)])
    options: dict[str, Any] = {"batch_size": batch, "seed": 3, "stretch": stretch, "drop_last": drop_last}

    def batches(**more: Any) -> PaddedBatches:
        return PaddedBatches(ragged.lengths_N, lambda i: ragged.padded(i, pad=-1), **options, **more)

    whole, ranks = batches(), [batches(rank=r, world_size=2) for r in range(2)]
    found = []
    for i in reversed(range(len(whole))):
        indices = whole.indices(1, i)
        assert torch.equal(torch.cat([rank.indices(1, i) for rank in ranks]), indices)
        padded = whole.get(1, i)
        assert padded.shape[1] == max(lengths[j] for j in indices)
        assert [[v for v in row if v != -1] for row in padded.tolist()] == [[j] * lengths[j] for j in indices.tolist()]
        found += indices.tolist()
    assert len(set(found)) == len(found)
    assert len(found) == (len(lengths) // batch * batch if drop_last else len(lengths))
    assert [batches().indices(1, i).tolist() for i in range(len(whole))] == [
        whole.indices(1, i).tolist() for i in range(len(whole))
    ]


def test_padded_batches_hold_similar_lengths_in_a_new_order_each_pass() -> None:
    lengths = torch.randint(1, 50, (640, 2))
    batches = PaddedBatches(lengths, lambda i: lengths[i].sum(1), batch_size=8, seed=0)
    sums = [batches.get(0, i) for i in range(len(batches))]
    spread = sum(float(s.max() - s.min()) for s in sums) / len(sums)
    assert spread < 0.1 * float(lengths.sum(1).max() - lengths.sum(1).min())
    means = torch.stack([s.double().mean() for s in sums])
    assert torch.corrcoef(torch.stack([means, torch.arange(len(means)).double()]))[0, 1].abs() < 0.5
    assert batches.indices(0, 0).tolist() != batches.indices(1, 0).tolist()
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"batch_size": 641}, "only 640"),
        ({"batch_size": 3, "world_size": 2}, "multiple"),
        ({"stretch": 0}, "stretch"),
    )
    for bad, words in refused:
        with pytest.raises(ValueError, match=words):
            PaddedBatches(lengths, lambda i: i, **{"batch_size": 8, "seed": 0, **bad})


# ---- runs --------------------------------------------------------------------------------------------------------

CORPUS = "the cat sat on the mat and the dog sat on the log. " * 400


def config(place: Path, **options: Any) -> Config:
    chosen: dict[str, Any] = {
        "model": "bert_nano",
        "branches": 2,
        "depth": 1,
        "width": 16,
        "mlp": 32,
        "context": 16,
        "data": "text",
        "data_dir": place,
        "vocab_size": 290,
        "dropout": 0.1,
        "budget": "16 steps",
        "batch_size": 8,
        "learning_rate": 1e-2,
        "validations": 2,
        "precision": "float32",
        "device": "cpu",
        **options,
    }
    return Config().replace(**chosen)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(CORPUS)
    return path


@pytest.fixture(scope="module")
def run(corpus: Path) -> Path:
    folder = corpus.parent / "run"
    start_run(config(corpus, budget="60 steps", schedule="one_pass"), folder)
    return folder


def test_a_run_learns_to_guess_and_says_so(run: Path, corpus: Path, capsys: pytest.CaptureFixture) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert len(evaluation["accuracy"]) == len(evaluation["perplexity"]) == 2
    assert evaluation["loss"][-1] < 3.5  # ln 290 = 5.7 before training
    assert evaluation["perplexity"][-1] == pytest.approx(torch.tensor(evaluation["loss"][-1]).exp().item())
    again = answer(capsys, "evaluate", run)
    assert again["accuracy"] == evaluation["accuracy"]
    assert answer(capsys, "evaluate", run, "--branches", "1")["loss"] == pytest.approx(evaluation["loss"][:1], rel=1e-5)

    (found,) = answer(capsys, "predict", run, "the cat sat on the <mask> and the", "--top", "3")["predictions"]
    assert len(found["masks"]) == 1
    assert [guess["token"].strip() in CORPUS for guess in found["masks"][0]] == [True] * 3
    model, tokenizer = from_pretrained(run), load_tokenizer(run)
    two = fill_mask(model, tokenizer, "the <mask> sat on<mask> mat", top=1, branches=1)
    assert len(two) == 2
    assert all(0 < place[0][1] <= 1 for place in two)
    assert main(["predict", str(run), "the cat <mask> on"]) == 0
    assert "the cat <mask> on: '" in capsys.readouterr().out


def test_what_cannot_be_filled_is_refused_in_words(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, words in (
        (["the cat sat"], "has no <mask>"),
        (["the cat sat on the mat and " * 4 + "<mask>"], "context is 16"),
        (["<mask>", "--top", "0"], "top is 0"),
        (["<mask>", "--branches", "3"], "branches is 3"),
        (["<mask>", "--pairs"], "pairs are texts to classify"),
        ([], "at least one text"),
    ):
        assert main(["predict", str(run), *arguments]) == 2
        assert words in capsys.readouterr().err
    other = from_pretrained(run).save_pretrained(tmp_path / "other")
    ByteTokenizer(special=True).save(other)
    assert main(["predict", str(other), "a <mask>"]) == 2
    assert "do not belong together" in capsys.readouterr().err


def test_interrupted_and_resumed_is_uninterrupted(corpus: Path, tmp_path: Path) -> None:
    stop = stop_at(11)

    options = config(corpus, checkpoint_every=5)
    start_run(options, tmp_path / "whole")
    with pytest.raises(Stop):
        start_run(options, tmp_path / "cut", on_batch=stop)
    resume_run(tmp_path / "cut")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert events(tmp_path / "whole", "validation") == events(tmp_path / "cut", "validation")


def test_evaluation_hides_the_same_tokens_whatever_the_seed_and_training_others_in_every_step(corpus: Path) -> None:
    one, two = (load_data(config(corpus, seed=seed)) for seed in (0, 1))
    (tokens, places), targets = one.ordered("test", 0, 6)
    (_, again), _ = two.ordered("test", 0, 6)
    assert torch.equal(places, again)
    (part, _), part_targets = one.ordered("test", 2, 4)
    assert torch.equal(part, tokens[2:4])
    assert torch.equal(part_targets, targets[2:4])
    assert (tokens[:, 0] == one.data.tokenizer.special("<s>")).all()
    assert (tokens[:, -1] == one.data.tokenizer.special("</s>")).all()
    windows = one.batches(_world()).get(0, 0)[0]
    first, second = (one.prepare(windows, windows, step=step, first=0)[0][1] for step in (0, 1))
    assert not torch.equal(first, second)
    half = one.prepare(windows[4:], windows[4:], step=0, first=4)[0][1]
    assert torch.equal(half, first[4:])


def _world() -> Any:
    from paradepth.distributed import World

    return World(0, 1, torch.device("cpu"))


def test_bad_text_and_options_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("für ".encode("latin-1") * 200)
    (tmp_path / "empty.txt").write_bytes(b"")
    for options, words in (
        ({"data_dir": tmp_path / "latin.txt"}, "not UTF-8"),
        ({"data_dir": tmp_path / "empty.txt"}, "too short"),
        ({"context": 2}, "context is 2"),
        ({"context": 30000}, "take a shorter context"),
        ({"masking": 1.5}, "masking is 1.5"),
        ({"columns": ("a", "b")}, "columns is"),
    ):
        with pytest.raises(ValueError, match=words):
            start_run(config(corpus, **options), tmp_path / "run")
    assert task_class(config(corpus)).__name__ == "MaskedTask"
    with pytest.raises(ValueError, match=r"masking is 0\.2; it means nothing"):
        task_class(Config().replace(model="gpt_nano", data="text", masking=0.2))


def test_special_tokens_are_added_behind_all_others() -> None:
    inner = BPETokenizer.train(["the cat sat on the mat"] * 5, vocab_size=270)
    assert with_specials(inner) is inner
    assert with_specials(ByteTokenizer()).specials == ByteTokenizer(special=True).specials
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bare = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain = BPETokenizer(bare)
    more = with_specials(plain)
    assert (plain.vocab_size, more.vocab_size) == (3, 7)
    assert sorted(more.specials.values()) == [3, 4, 5, 6]
    assert more.encode("abba") == plain.encode("abba")
