"""Tagging runs: figures against their tags, resuming, commands, recipes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import paradepth
from commands import answer
from paradepth.cli import main
from paradepth.data.tag_data import pieces
from paradepth.data.tagged import read_conllu
from paradepth.data.words import OWN, UNKNOWN, WordVocabulary, load_words
from paradepth.distributed import World
from paradepth.models import model_config
from paradepth.predict import tag
from paradepth.recipes import get_recipe
from paradepth.train import resume_run, start_run
from paradepth.train.config import check_options
from paradepth.train.step import IGNORED
from paradepth.train.tasks import load_data
from paradepth.train.tasks.tagging import TaggingTask
from runs import Stop, events, stop_at
from tagging_helpers import config, grammar, rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("treebank")
    odd = rows(("zzz", "INTJ", "Odd=Yes"), ("the", "DET", "PronType=Art"), ("x", "_", "_"))
    for part, count, seed in (("train", 160, 0), ("dev", 30, 1), ("test", 30, 2)):
        (folder / f"{part}.conllu").write_text(grammar(count, seed) + (odd if part == "test" else ""))
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagging") / "run"
    start_run(config(corpus), folder)
    return folder


def test_a_run_learns_and_every_figure_is_what_its_tags_say(run: Path, corpus: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    model, vocabulary = paradepth.from_pretrained(run), load_words(run)
    assert model.config.class_names == ("DET", "NOUN", "PUNCT", "VERB"), "the labels of the training sentences"
    sentences = read_conllu(corpus / "test.conllu")
    names = evaluation["class_names"]
    for k in (1, 2):
        labels = tag(model, vocabulary, [s.words for s in sentences], branches=k)
        pairs = [(g, p) for s, found in zip(sentences, labels, strict=True) for g, p in zip(s.upos, found, strict=True)]
        counted = [(gold, found) for gold, found in pairs if gold != "_"]
        assert len(pairs) == len(counted) + 1
        right = sum(gold == found for gold, found in counted) / len(counted)
        assert evaluation["accuracy"][k - 1] == pytest.approx(right, abs=1e-9)
    assert 0.9 < evaluation["accuracy"][1] < 1, "INTJ is in no training sentence, so it counts as wrong"
    assert (evaluation["words"], evaluation["unseen_labels"]) == (len(pairs), 1)
    confusion = [[sum(pair == (a, b) for pair in counted) for b in names] for a in names]
    assert evaluation["confusion"] == confusion
    examples = evaluation["examples"]
    assert examples[0]["labels"] != examples[0]["prediction"]
    assert all(len(e["words"]) == len(e["labels"]) == len(e["prediction"]) for e in examples)
    assert events(run, "start")[0]["train_samples"] == sum(
        len(pieces(len(s.words), 8)) for s in read_conllu(corpus / "train.conllu")
    )
    assert all(len(v["accuracy"]) == 2 for v in events(run, "validation"))


def test_the_loss_is_the_mean_over_known_labels(run: Path, corpus: Path) -> None:
    model, vocabulary = paradepth.from_pretrained(run), load_words(run)
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for sentence in read_conllu(corpus / "test.conllu"):
        start = 0
        for length in pieces(len(sentence.words), 8):
            with torch.no_grad():
                log_p = model.prefix_logits(vocabulary.encode([sentence.words[start : start + length]])).log_softmax(-1)
            for place, name in enumerate(sentence.upos[start : start + length]):
                if name in model.config.class_names:
                    sums -= log_p[:, 0, place, model.config.class_names.index(name)].double()
                    count += 1
            start += length
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["loss"] == pytest.approx((sums / count).tolist(), rel=1e-5)


@pytest.mark.parametrize("tags", ["features", "both"])
def test_features_and_pairs_are_scored_by_part(tags: str, corpus: Path, tmp_path: Path) -> None:
    start_run(config(corpus, tags=tags, pack=True, budget="30 steps", batch_size=8), tmp_path / "run")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    task = load_data(config(corpus, tags=tags, pack=True), assets=tmp_path / "run")
    assert isinstance(task, TaggingTask)
    names, model = task.data.class_names, paradepth.from_pretrained(tmp_path / "run")
    assert ("_" in names) is (tags == "features"), "no features are a label of their own"
    right = {"accuracy": [0, 0], "upos_accuracy": [0, 0], "features_accuracy": [0, 0]}
    predicted_nW = task.predictions(model, "test")
    sentences = read_conllu(corpus / "test.conllu")
    words = [w for s in sentences for w in zip(s.labels(task.data.tags), s.upos, s.features, strict=True)]
    counted = [tags == "features" or label != "_" for label, _, _ in words]
    for k in range(2):
        for (label, upos, features), found, counts in zip(words, predicted_nW[k].tolist(), counted, strict=True):
            if counts:
                guess = names[found]
                right["accuracy"][k] += guess == label
                right["upos_accuracy"][k] += guess.partition("|")[0] == upos
                right["features_accuracy"][k] += guess.partition("|")[2] == features
    for key, values in right.items():
        if key == "accuracy" or tags == "both":
            assert evaluation[key] == pytest.approx([value / sum(counted) for value in values], abs=1e-9)
            assert evaluation[key] == events(tmp_path / "run", "validation")[-1][key] or evaluation[key][1] > 0.3
        else:
            assert key not in evaluation
    assert "confusion" not in evaluation
    assert len(events(tmp_path / "run", "validation")[-1]["loss"]) == 2


@pytest.mark.parametrize("kind", ["one_pass", "mgrit"])
def test_resuming_is_exact(kind: str, corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_every": 5, "budget": "14 steps", "accumulate": 2}
    if kind == "mgrit":
        options |= {"schedule": "joint", "branches": None, "depth": 4, "step": 0.5, "executor": "mgrit"}
        options |= {"coarsening": 2, "forward_iterations": 1, "backward_iterations": 1, "optimiser": "sgd"}
    start_run(config(corpus, **options), tmp_path / "whole")

    stop = stop_at(12)
    with pytest.raises(Stop):
        start_run(config(corpus, **options), tmp_path / "cut", on_batch=stop)
    resume_run(tmp_path / "cut")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert events(tmp_path / "cut", "validation") == events(tmp_path / "whole", "validation")


def test_word_dropout_hides_whole_words_and_is_a_function_of_the_step(corpus: Path) -> None:
    task = load_data(config(corpus, word_dropout=0.3))
    inputs, targets = task.ordered("train", 0, 200)
    once, same = task.prepare(inputs, targets, step=3, first=0)
    assert same is targets
    assert torch.equal(once, task.prepare(inputs, targets, step=3, first=0)[0])
    assert not torch.equal(once, task.prepare(inputs, targets, step=4, first=0)[0])
    second_half = task.prepare(inputs[100:, :-1], targets, step=3, first=100)[0]
    assert torch.equal(second_half, once[100:, :-1]), "however a batch is split and padded"
    changed = (once != inputs).any(dim=-1)
    assert (once[changed][:, :OWN] == UNKNOWN).all()
    assert torch.equal(once[..., OWN:], inputs[..., OWN:])
    known = (inputs[..., 0] > UNKNOWN).sum()
    assert 0.25 < (once[..., 0][inputs[..., 0] > UNKNOWN] == UNKNOWN).sum() / known < 0.35
    assert not once[inputs[..., 0] == 0].any(), "padding stays padding"
    plain = load_data(config(corpus, word_dropout=None))
    assert plain.prepare(inputs, targets, step=3, first=0)[0] is inputs


def test_a_batch_is_the_same_on_one_process_and_on_two(corpus: Path) -> None:
    task = load_data(config(corpus))
    whole, labels = task.batches(World(0, 1, torch.device("cpu"))).get(1, 2)
    parts = [task.batches(World(rank, 2, torch.device("cpu"))).get(1, 2) for rank in (0, 1)]
    rows_seen = [row[row[:, 0] != 0] for inputs, _ in parts for row in inputs]
    for row, part in zip(whole, rows_seen, strict=True):
        assert torch.equal(row[row[:, 0] != 0], part)
    assert sum(int((t != IGNORED).sum()) for _, t in parts) == int((labels != IGNORED).sum())


def test_a_new_task_starts_from_a_tagger_with_its_words_and_a_new_head(run: Path, corpus: Path, tmp_path: Path) -> None:
    options = {"init": run, "data_dir": corpus / "dev.conllu", "budget": "1 step", "learning_rate": 1e-9}
    for tags, same_head in (("upos", True), ("features", False)):
        start_run(config(corpus, **options, tags=tags), tmp_path / tags)
        assert load_words(tmp_path / tags).words == load_words(run).words
        before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / tags))
        torch.testing.assert_close(before["stem.embed.weight"], after["stem.embed.weight"])
        name = "head.classify.weight"
        assert (before[name].shape == after[name].shape and torch.allclose(before[name], after[name])) is same_head


def test_commands_on_a_tagging_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = json.loads((run / "evaluation.json").read_text())
    first = answer(capsys, "evaluate", run, "--branches", "1")
    assert first["accuracy"] == pytest.approx(kept["accuracy"][:1])
    assert main(["predict", str(run), "the station moves .", "a fabion opizes ."]) == 0
    said = capsys.readouterr().out
    assert "the/DET station/NOUN moves/" in said
    assert "a/DET fabion/NOUN opizes/VERB ./PUNCT" in said
    told = answer(capsys, "predict", run, "The dabions opize.", "--raw", "--branches", "2")["predictions"]
    words = ["The", "dabions", "opize", "."]
    expected = tag(paradepth.from_pretrained(run), load_words(run), [words], branches=2)[0]
    assert told == [{"words": words, "tags": expected}]
    assert main(["report", str(run), "--out", str(tmp_path / "one.html")]) == 0
    assert "dabion" not in (tmp_path / "one.html").read_text()
    for arguments, message in (
        ([" "], "the sentence ' ' has no words"),
        ([], "at least one sentence"),
        (["a", "--top", "2"], "top is 2"),
        (["a", "--pairs"], "pairs are texts to classify"),
        (["a", "--branches", "9"], "branches"),
    ):
        assert main(["predict", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "moved").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "moved" / name).write_bytes((run / name).read_bytes())
    assert main(["predict", str(tmp_path / "moved"), "a"]) == 2
    assert "has no vocabulary of words" in capsys.readouterr().err
    WordVocabulary(["other"]).save(tmp_path / "moved")
    assert main(["predict", str(tmp_path / "moved"), "a"]) == 2
    assert "do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": True}, "flip is True; it means nothing to data 'conllu', which is tagged sentences"),
        ({"tokenizer": "bpe"}, "tokenizer is 'bpe'; it means nothing"),
        ({"model": "gpt_nano"}, "'gpt_nano', which is not for tagged sentences.*tagger_nano"),
        ({"data": "digits", "data_dir": None, "model": "vit_nano"}, "means nothing to data 'digits'"),
        ({"tags": "lemmas"}, "tags is 'lemmas'; it must be 'upos', 'features' or 'both'"),
        ({"word_dropout": 1.0}, "word_dropout is 1.0"),
        ({"batch_size": 5000}, r"training samples \(sentences\)"),
        ({"context": 0}, "context is 0"),
        ({"data_dir": Path("nowhere")}, "nowhere is neither a file nor a folder"),
        ({"schedule": "joint", "branches": None, "executor": "mgrit", "coarsening": 9}, "coarsening"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        start_run(config(corpus, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_training_labels_changed_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "train.conllu").write_text(grammar(40, 5) + rows(("new", "SYM", "_")) * 40)
    task = load_data(config(tmp_path), assets=run)
    assert task.data.class_names == paradepth.from_pretrained(run).config.class_names
    with pytest.raises(ValueError, match="have labels that this run does not know, such as 'SYM'"):
        task.batches(World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("ewt_paraformer", ["--width", "16"]),
        ("ewt_mgrit", ["--width", "16", "--depth", "8"]),
        ("mc_gum_published", ["--width", "16", "--depth", "4", "--context", "64"]),
    ],
)
def test_recipes_train_from_the_command_line(recipe: str, options: list[str], corpus: Path, tmp_path: Path) -> None:
    words = ["train", recipe, "--data", "conllu", "--data-dir", str(corpus), "--run-dir", str(tmp_path / "run")]
    words += ["--budget", "2 steps", "--batch-size", "4", "--mlp", "16", "--validations", "1", *options]
    assert main([*words, "--json"]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model_type"] == "tagger"
    assert load_words(tmp_path / "run").size == saved["model"]["vocab_size"]
    samples = events(tmp_path / "run", "start")[0]["train_samples"]
    assert samples == 160 if not saved["training"]["pack"] else samples < 40, "sentences that share their samples"


def test_the_published_size_is_what_the_paper_states() -> None:
    recipe = get_recipe("mc_gum_published")
    check_options(recipe)
    m, o, d = recipe.model_options, recipe.optimiser_options, recipe.depth_options
    shape = model_config(m.model)
    assert (shape.depth, shape.width, shape.heads, shape.mlp, shape.context) == (64, 128, 1, 128, 2048)
    assert (o.optimiser, o.learning_rate, o.momentum, o.batch_size) == ("sgd", 1e-2, 0.9, 8)
    assert (d.levels, d.coarsening, d.forward_iterations, d.backward_iterations) == (2, 2, 2, 1)
    assert recipe.data_options.pack
