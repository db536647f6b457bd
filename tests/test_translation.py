"""Translation runs: what they learn, their scores, resuming, two processes, and the command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import paradepth
from commands import answer
from paradepth.cli import main
from paradepth.data import load_tokenizer
from paradepth.models import translate
from paradepth.models.translator import too_long
from paradepth.recipes import get_recipe
from paradepth.train import Config, resume_run, start_run
from paradepth.train.accounting import update_cost
from paradepth.train.schedules import Objective
from paradepth.train.use import evaluate_run
from processes import run_together
from runs import Stop, events, stop_at
from test_pairs import NUMBERS as WORDS
from test_pairs import write_jsonl

NUMBERS = [
    (" ".join(de for de, _ in four), " ".join(en for _, en in four))
    for four in list(itertools.permutations(WORDS, 4))[::10]
]


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers")
    everything = NUMBERS
    write_jsonl(folder / "train.jsonl", everything * 6)
    write_jsonl(folder / "validation.jsonl", everything[:8])
    write_jsonl(folder / "test.jsonl", everything)
    return folder


def options(corpus: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": "translator_nano",
        "data": "pairs",
        "data_dir": corpus,
        "languages": ("de", "en"),
        "vocab_size": 280,
        "context": 24,
        "depth": 1,
        "dropout": 0.0,
        "batch_size": 12,
        "budget": "8 steps",
        "validations": 2,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        "timeout": 60.0,
        **more,
    }


def config(corpus: Path, **more: Any) -> Config:
    return Config().replace(**options(corpus, **more))


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two branches that learn the numbers by heart."""
    place = tmp_path_factory.mktemp("run") / "numbers"
    more = {"branches": 2, "budget": "120 steps", "learning_rate": 5e-3, "label_smoothing": 0.1, "prefix_losses": True}
    start_run(config(corpus, schedule="stagewise", decay="inverse_sqrt", warmup=0.2, **more), place)
    return place


def test_a_run_learns_to_translate_and_is_scored_by_prefix(run: Path, corpus: Path) -> None:
    found = json.loads((run / "evaluation.json").read_text())
    references = [en for _, en in NUMBERS]
    assert found["bleu"][-1] > 90
    assert found["chrf"][-1] > 90
    built, tokenizer = paradepth.from_pretrained(run), load_tokenizer(run)
    for k in (1, 2):
        said = translate(built, tokenizer, [de for de, _ in NUMBERS], branches=k)
        assert said == [example["by_prefix"][k - 1] for example in found["examples"]]
        assert found["bleu"][k - 1] == pytest.approx(sacrebleu.corpus_bleu(said, [references]).score)
        assert found["chrf"][k - 1] == pytest.approx(sacrebleu.corpus_chrf(said, [references]).score)
    assert (
        found["signatures"]["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )
    assert found["decoding"].startswith("beam search, 4 beams")
    first = found["examples"][0]
    assert (first["source"], first["reference"]) == NUMBERS[0]
    assert first["translation"] == first["by_prefix"][-1]
    assert len(found["loss"]) == len(found["accuracy"]) == 2
    assert "bleu" not in events(run, "validation")[-1]


def test_operations_are_counted_for_the_length_that_pairs_have(corpus: Path, tmp_path: Path) -> None:
    start_run(config(corpus, budget="4 steps"), tmp_path / "run")
    built, tokenizer = paradepth.from_pretrained(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    source, target = (sum(len(tokenizer.encode(pair[side])) + 1 for pair in NUMBERS) / len(NUMBERS) for side in (0, 1))
    cost = update_cost(built, Objective(1), built.parts(), tokens=(round(source), round(target)))
    assert events(tmp_path / "run", "end")[0]["flops"] == pytest.approx(4 * 12 * cost.flops)
    assert cost.flops < update_cost(built, Objective(1), built.parts()).flops


def test_evaluating_measures_again(run: Path, corpus: Path) -> None:
    found = json.loads((run / "evaluation.json").read_text())
    again = evaluate_run(run)
    assert again["bleu"] == found["bleu"]
    assert again["loss"] == pytest.approx(found["loss"])
    one = evaluate_run(run, branches=1, split="validation")
    assert len(one["bleu"]) == 1
    assert len(one["examples"]) == 8


def test_the_loss_is_the_mean_over_all_target_tokens(run: Path, corpus: Path) -> None:
    built, tokenizer = paradepth.from_pretrained(run), load_tokenizer(run)
    start, end = tokenizer.special("<s>"), tokenizer.special("</s>")
    total, count = 0.0, 0
    for de, en in NUMBERS:
        source, target = [*tokenizer.encode(de), end], [start, *tokenizer.encode(en), end]
        with torch.no_grad():
            logits = built((torch.tensor([source]), torch.tensor([target[:-1]])))[0]
        total += float(F.cross_entropy(logits.double(), torch.tensor(target[1:]), reduction="sum"))
        count += len(target) - 1
    assert json.loads((run / "evaluation.json").read_text())["loss"][-1] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("kind", ["joint", "one_pass", "stagewise", "mgrit"])
def test_resuming_is_exact(kind: str, corpus: Path, tmp_path: Path) -> None:
    parallel = {"executor": "mgrit", "coarsening": 2, "depth": 2, "forward_iterations": 1, "backward_iterations": 1}
    more = parallel if kind == "mgrit" else {"branches": 2, "schedule": kind}
    chosen = config(corpus, dropout=0.1, checkpoint_every=3, **more)

    stop = stop_at(5)  # between two checkpoints
    start_run(chosen, tmp_path / "whole")
    with pytest.raises(Stop):
        start_run(chosen, tmp_path / "cut", on_batch=stop)
    resume_run(tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert events(tmp_path / "whole", "train")[-1] == events(tmp_path / "cut", "train")[-1]


@pytest.mark.slow
def test_two_processes_share_encoder_and_decoder_and_train_like_one(corpus: Path, tmp_path: Path) -> None:
    more = {"depth": 2, "dropout": 0.1, "executor": "mgrit", "coarsening": 2, "budget": "4 steps"}
    more |= {"forward_iterations": 1, "backward_iterations": 1}
    start_run(config(corpus, **more), tmp_path / "one")
    flags: list[str] = []
    for name, value in options(corpus, **more).items():
        flags += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    command = ["-m", "paradepth", "train", "multi30k_transformer", "--run-dir", tmp_path / "two", *flags]
    settings_of_recipe = get_recipe("multi30k_transformer").optimiser_options
    same = ["--learning-rate", "1e-3", "--warmup", "0.05", "--label-smoothing", "0"]
    assert settings_of_recipe.weight_decay == 0.05
    for status, _, errors in run_together(2, *command, *same):
        assert status == 0, errors
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    scores = [json.loads((tmp_path / name / "evaluation.json").read_text())["bleu"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_sentences_files_and_standard_input_are_translated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    german, english = zip(*NUMBERS[:9], strict=True)
    assert main(["translate", str(run), *german[:2]]) == 0
    assert capsys.readouterr().out == f"{english[0]}\n{english[1]}\n"
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("\n".join([*german[:4], "", *german[4:]]) + "\n")
    arguments = ["translate", str(run), "--file", str(source), "--batch-size", "2"]
    told = answer(capsys, *arguments, "--out", out)
    assert out.read_text().split("\n") == [*english[:4], "", *english[4:], ""]
    assert (told["sentences"], told["cut"], told["out"]) == (10, [], str(out))
    said = answer(capsys, *arguments, "--beams", 1, "--branches", 1)["translations"]
    built, tokenizer = paradepth.from_pretrained(run), load_tokenizer(run)
    assert said == translate(built, tokenizer, source.read_text().split("\n")[:-1], beams=1, branches=1)
    monkeypatch.setattr("sys.stdin", _Input(source.read_bytes()))
    assert main(["translate", str(run)]) == 0
    assert capsys.readouterr().out == out.read_text()


class _Input:
    def __init__(self, content: bytes) -> None:
        import io

        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


def test_long_sentences_are_cut_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built, tokenizer = paradepth.from_pretrained(run), load_tokenizer(run)
    short, long = NUMBERS[0][0], " ".join(["eins"] * 40)
    assert too_long(built, tokenizer, [short, long]) == [2]
    with pytest.warns(UserWarning, match="1 sentence"):
        said = translate(built, tokenizer, [short, long])
    assert said[0] == NUMBERS[0][1]
    assert main(["translate", str(run), short, long, "--json"]) == 0
    captured = capsys.readouterr()
    assert "longer than the model's 24 tokens, and so cut: sentences 2" in captured.err
    assert json.loads(captured.out)["cut"] == [2]
    assert json.loads(captured.out)["translations"] == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eins", "--file", "x.txt"], "sentences or a file, and it was given both"),
        (["--file", "missing.txt"], "missing.txt cannot be read"),
        (["eins", "--out", "missing/out.txt"], "in a folder that exists"),
        (["eins", "--beams", "0"], "beams is 0; it must be at least 1"),
        (["eins", "--batch-size", "0"], "batch_size is 0"),
        (["eins", "--branches", "3"], "branches is 3; this model has 2"),
        (["eins", "--max-tokens", "25"], "max_tokens is 25; it must be between 1 and 24"),
        (["eins", "--length-penalty", "-1"], "length_penalty is -1.0"),
    ],
)
def test_the_command_refuses_in_words(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["translate", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_utf8_leaves_the_old_output(run: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes(b"eins\nz\xfcei\n")
    out.write_text("old")
    assert main(["translate", str(run), "--file", str(source), "--out", str(out)]) == 2
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


def test_another_tokeniser_and_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    from paradepth.data import ByteTokenizer

    built = paradepth.from_pretrained(run)
    with pytest.raises(ValueError, match="the tokeniser has 260 tokens and the model a vocabulary of"):
        translate(built, ByteTokenizer(special=True), ["eins"])
    paradepth.create_model("vit_nano", image_size=8, patch_size=4, depth=1).save_pretrained(tmp_path / "vit")
    assert main(["translate", str(tmp_path / "vit"), "eins"]) == 2


def test_the_published_size_is_what_the_paper_states() -> None:
    chosen = get_recipe("opus_published")
    with torch.device("meta"):
        built = paradepth.create_model(chosen.model_options.model)
    c = built.config
    assert (c.depth, c.layers, c.width, c.heads, c.mlp, c.context) == (6, 12, 512, 8, 2048, 274)
    o, d = chosen.optimiser_options, chosen.depth_options
    assert (o.batch_size, o.learning_rate, o.decay, o.label_smoothing) == (8, 5e-4, "inverse_sqrt", 0.1)
    assert o.warmup * 160_000 == 8_000
    assert (d.levels, d.coarsening, d.forward_iterations, d.backward_iterations) == (2, 3, 2, 1)
