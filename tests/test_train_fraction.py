"""A part of the training split: stratified, nested, the same for every process and after a resume; what is tested and
validated on stays whole. And images converted to other channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from paradepth.data import load_images, load_pairs, load_tagged, load_text
from paradepth.data.corpus import Segment, stretch
from paradepth.data.images import channel_statistics
from paradepth.data.labelled import load_labelled
from paradepth.data.split import training_part
from paradepth.distributed import World
from paradepth.train import Config, resume_run, start_run
from paradepth.train.config import check_options
from paradepth.train.finetune import finetune_config
from paradepth.train.tasks import load_data
from processes import fork_together
from runs import Stop, events, stop_at, tiny_config

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(torch.tensor)
FRACTION = st.floats(0.0, 1.0, exclude_min=True)


@given(LABELS, FRACTION, st.integers(0, 3))
def test_every_class_gives_its_share_and_at_least_one(labels: torch.Tensor, fraction: float, seed: int) -> None:
    part = training_part(labels, fraction, seed=seed)
    assert part.tolist() == sorted(set(part.tolist()))
    for label in labels.unique():
        there, chosen = int((labels == label).sum()), int((labels[part] == label).sum())
        assert chosen == max(1, round(fraction * there))
    assert torch.equal(part, training_part(labels, fraction, seed=seed))


@given(LABELS, FRACTION, FRACTION, st.integers(0, 3))
def test_a_smaller_part_lies_within_a_larger_one(labels: torch.Tensor, a: float, b: float, seed: int) -> None:
    small, large = (set(training_part(labels, f, seed=seed).tolist()) for f in sorted((a, b)))
    assert small <= large


def test_another_seed_chooses_others() -> None:
    labels = torch.zeros(1000).long()
    a, b = (set(training_part(labels, 0.1, seed=seed).tolist()) for seed in (0, 1))
    assert len(a) == len(b) == 100
    assert len(a & b) < 30  # 10 on average


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), FRACTION, FRACTION, st.floats(0.0, 1.0))
def test_a_stretch_of_text_is_contiguous_and_nested(lengths: list[int], a: float, b: float, place: float) -> None:
    text = tuple(Segment(Path(str(i)), 2 * i, 2 * i + length) for i, length in enumerate(lengths))
    everything = [(part.path, byte) for part in text for byte in range(part.start, part.stop)]
    found = []
    for fraction in sorted((a, b)):
        chosen = [(part.path, byte) for part in stretch(text, fraction, place) for byte in range(part.start, part.stop)]
        start = everything.index(chosen[0])
        assert chosen == everything[start : start + len(chosen)]
        assert len(chosen) == max(1, round(fraction * len(everything)))
        found.append((start, start + len(chosen)))
    (start, stop), (first, last) = found
    assert start >= first - 1  # places are rounded, each by itself
    assert stop <= last + 1


def test_images_of_a_part() -> None:
    whole, part = (load_images("digits", seed=3, train_fraction=f) for f in (1.0, 0.05))
    counts, kept = (data.train.labels_N.bincount(minlength=10) for data in (whole, part))
    assert kept.tolist() == [max(1, round(0.05 * int(count))) for count in counts]
    there = {image.numpy().tobytes(): int(label) for image, label in zip(*vars(whole.train).values(), strict=True)}
    for image, label in zip(part.train.images_NCHW, part.train.labels_N, strict=True):
        assert there[image.numpy().tobytes()] == int(label)
    for split in ("validation", "test"):
        assert torch.equal(getattr(whole, split).images_NCHW, getattr(part, split).images_NCHW)
    assert (part.mean, part.std) == channel_statistics(part.train.images_NCHW)
    assert part.mean != whole.mean
    assert len(load_images("digits", train_fraction=1e-9).train) == 10


def test_texts_of_a_part(tmp_path: Path) -> None:
    reviews = "text,label\n" + "".join(f"film {i},{'good' if i % 4 else 'bad'}\n" for i in range(400))
    (tmp_path / "reviews.csv").write_text(reviews)
    options: dict[str, Any] = {"context": 24, "data_dir": tmp_path / "reviews.csv", "tokenizer": "bytes", "seed": 1}
    whole, part = (load_labelled("labelled", train_fraction=f, **options) for f in (1.0, 0.1))
    counts, kept = (data.splits["train"].labels_N.bincount() for data in (whole, part))
    assert kept.tolist() == [round(0.1 * int(count)) for count in counts]
    assert set(part.splits["train"].texts) <= set(whole.splits["train"].texts)
    for text, tokens in zip(part.splits["train"].texts, (part.splits["train"].tokens[i] for i in range(5))):
        assert part.tokenizer.decode(tokens[1:-1].tolist()) == text[0]
    assert all(part.splits[name].texts == whole.splits[name].texts for name in ("validation", "test"))

    for language in ("de", "en"):
        (tmp_path / f"train.{language}").write_text("".join(f"{language} {i}\n" for i in range(200)))
    options = {"data_dir": tmp_path, "languages": ("de", "en"), "tokenizer": "bytes", "seed": 1}
    pairs, few = (load_pairs("pairs", train_fraction=f, **options) for f in (1.0, 0.1))
    assert len(few.train) == round(0.1 * len(pairs.train))
    assert set(few.train.texts) < set(pairs.train.texts)
    assert few.train.texts == [pair for pair in pairs.train.texts if pair in few.train.texts]
    assert (few.validation.texts, few.test.texts) == (pairs.validation.texts, pairs.test.texts)

    word = "1\tword{}\t_\tNOUN\t_\t_\t0\troot\t_\t_\n\n"
    (tmp_path / "all.conllu").write_text("".join(word.format(i) for i in range(200)))
    options = {"data_dir": tmp_path / "all.conllu", "seed": 1}
    bank, small = (load_tagged("conllu", train_fraction=f, **options) for f in (1.0, 0.1))
    assert len(small.train) == round(0.1 * len(bank.train))
    assert small.train == tuple(sentence for sentence in bank.train if sentence in small.train)
    assert (small.validation, small.test) == (bank.validation, bank.test)

    (tmp_path / "a.txt").write_text("".join(f"{i} " for i in range(5000)))
    options = {"data_dir": tmp_path / "a.txt"}
    text, piece = (load_text("text", train_fraction=f, seed=5, **options) for f in (1.0, 0.1))
    assert bytes(piece.train.tolist()) in bytes(text.train.tolist())
    assert len(piece.train) == round(0.1 * len(text.train))
    assert torch.equal(piece.validation, text.validation)
    assert torch.equal(piece.test, text.test)
    assert not torch.equal(piece.train, load_text("text", train_fraction=0.1, seed=6, **options).train)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_there_is_no_such_part(fraction: float, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 20)
    config = tiny_config(train_fraction=fraction)
    with pytest.raises(ValueError, match=r"train_fraction is .*above 0 and at most 1"):
        check_options(config)
    places: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (training_part, (torch.zeros(3),), {"seed": 0}),
        (load_images, ("digits",), {}),
        (load_text, ("text",), {"data_dir": tmp_path}),
        (load_labelled, ("labelled",), {"context": 9, "data_dir": tmp_path}),
        (load_pairs, ("pairs",), {"languages": ("de", "en"), "data_dir": tmp_path}),
        (load_tagged, ("conllu",), {"data_dir": tmp_path}),
    ]
    for function, words, options in places:
        name = "fraction" if function is training_part else "train_fraction"
        with pytest.raises(ValueError, match=r"train_fraction is .*above 0 and at most 1"):
            function(*words, **{name: fraction}, **options)


def test_epochs_count_the_part_and_the_model_has_its_statistics(tmp_path: Path) -> None:
    config = tiny_config(train_fraction=0.1, budget="2 epochs")
    result = start_run(config, tmp_path / "run")
    task = load_data(config)
    assert task.count("train") == 129  # rounded class by class
    assert result["steps"] == 2 * (129 // 32)
    assert events(tmp_path / "run", "start")[0]["train_samples"] == 129
    assert events(tmp_path / "run", "start")[0]["validation_samples"] == 143
    mean = load_file(tmp_path / "run" / "model.safetensors")["stem.pixel_mean"]
    assert mean.tolist() == pytest.approx(load_images("digits", train_fraction=0.1).mean)
    with pytest.raises(ValueError, match="batch_size is 32 but digits has only 10 training samples"):
        start_run(tiny_config(train_fraction=0.01), tmp_path / "small")


def test_resuming_reads_the_same_part(tmp_path: Path) -> None:
    config = tiny_config(train_fraction=0.1, checkpoint_every=5)
    start_run(config, tmp_path / "whole")

    stop = stop_at(13)
    with pytest.raises(Stop):
        start_run(config, tmp_path / "cut", on_batch=stop)
    resume_run(tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_two_processes_share_one_part(tmp_path: Path) -> None:
    options = {"train_fraction": 0.1, "budget": "10 steps", "validations": 2, "dropout": 0.0}
    jobs = [{"run": "two", "kind": "joint", "options": options}]
    ended = fork_together(2, Path(__file__).with_name("branch_runs.py"), tmp_path, json.dumps(jobs))
    assert [status for status, _, _ in ended] == [0, 0], ended
    start_run(tiny_config("joint", **options), tmp_path / "one")
    for two, one in zip(*(events(tmp_path / name, "validation") for name in ("two", "one")), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    config = tiny_config("joint", **options)
    both = [load_data(config).batches(World(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    alone = load_data(config).batches(World(0, 1, torch.device("cpu")))
    for index in range(len(alone)):
        halves = [part.get(3, index) for part in both]
        for place in (0, 1):
            assert torch.equal(torch.cat([half[place] for half in halves]), alone.get(3, index)[place])


# ---- channels ----------------------------------------------------------------------------------------------------


def write_colours(place: Path) -> None:
    draws = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for label in ("a", "b"):
            folder = place / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_channels_are_repeated_or_made_grey(tmp_path: Path) -> None:
    grey, three = (load_images("digits", channels=channels) for channels in (1, 3))
    assert (grey.channels, three.channels) == (1, 3)
    for split in ("train", "validation", "test"):
        one, many = (getattr(data, split).images_NCHW for data in (grey, three))
        assert torch.equal(one.expand(-1, 3, -1, -1), many)
    assert three.mean == grey.mean * 3
    write_colours(tmp_path)
    colours, faded = (load_images("folder", data_dir=tmp_path, channels=channels) for channels in (None, 1))
    luma = (colours.test.images_NCHW * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    assert torch.equal(faded.test.images_NCHW, luma.round().byte())
    with pytest.raises(ValueError, match="channels is 2"):
        load_images("digits", channels=2)


def test_fine_tuning_on_images_of_other_channels_and_size(tmp_path: Path) -> None:
    write_colours(tmp_path / "colours")
    model = {"model": "paraformer_nano", "branches": 2, "depth": 1, "patch_size": 4, "image_size": 16}
    fast: dict[str, Any] = {"precision": "float32", "device": "cpu", "validations": 1, "budget": "2 steps"}
    source = Config().replace(**model, **fast, data="folder", data_dir=tmp_path / "colours", batch_size=8)
    start_run(source, tmp_path / "source")
    config = finetune_config(tmp_path / "source", "digits")
    assert (config.data_options.channels, config.data_options.image_size) == (3, 16)
    start_run(config.replace(**fast, train_fraction=0.1), tmp_path / "tuned")
    config_json = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config_json["model"]["channels"] == 3
    assert config_json["training"]["train_fraction"] == 0.1
