"""Text: reading and cutting a corpus, and windows that are a pure function of (seed, pass, batch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paradepth.data import TextBatches, TextData, load_text
from paradepth.data.text_batches import ordered_windows

sizes = {"length": st.integers(80, 300), "context": st.integers(1, 12), "batch_size": st.integers(1, 4)}


def whole(data: TextData) -> bytes:
    return bytes(torch.cat([data.train, data.validation, data.test]).tolist())


def test_a_file_is_cut_into_contiguous_parts(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4 + "Käse".encode()
    (tmp_path / "any.md").write_bytes(content)
    data = load_text("text", data_dir=tmp_path / "any.md")
    assert whole(data) == content
    assert data.train.dtype == torch.uint8
    assert [len(part) for part in (data.train, data.validation, data.test)] == [927, 51, 51]
    other = load_text("text", data_dir=tmp_path / "any.md", validation_fraction=0.2)
    assert torch.equal(other.test, data.test)
    assert len(other.validation) == 206
    assert whole(other) == content


def test_a_folder_is_joined_in_the_order_of_names(tmp_path: Path) -> None:
    for name, letter in (("b.txt", "b"), ("a.txt", "a"), ("c.md", "c")):
        (tmp_path / name).write_text(letter * 50)
    assert whole(load_text("text", data_dir=tmp_path)) == b"a" * 50 + b"b" * 50


@pytest.mark.parametrize("place", ["input.txt", "tiny_shakespeare/input.txt"])
def test_tiny_shakespeare_is_found_in_its_folder_or_the_one_above(place: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("First Citizen: " * 20)
    data = load_text("tiny_shakespeare", data_dir=tmp_path)
    assert data.name == "tiny_shakespeare"
    assert whole(data).startswith(b"First Citizen")


def test_what_is_missing_or_too_short_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("To be")
    (tmp_path / "empty").mkdir()
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("poems", {}, "Known: tiny_shakespeare, text"),
        ("tiny_shakespeare", {}, r"https://.*input\.txt.*data_dir"),
        ("tiny_shakespeare", {"data_dir": tmp_path}, "has neither input.txt"),
        ("text", {}, "needs data_dir"),
        ("text", {"data_dir": tmp_path / "nothing"}, "neither a file nor a folder"),
        ("text", {"data_dir": tmp_path / "empty"}, r"no \*\.txt files"),
        ("text", {"data_dir": tmp_path}, "has 5 bytes: too short"),
        ("text", {"data_dir": tmp_path, "validation_fraction": 0.95}, "validation_fraction is 0.95"),
        ("text", {"data_dir": tmp_path, "validation_fraction": 0.0}, "validation_fraction is 0.0"),
    )
    for name, options, words in cases:
        with pytest.raises(ValueError, match=words):
            load_text(name, **options)


@given(**sizes, seed=st.integers(0, 5))
def test_in_a_pass_every_token_is_an_input_once_and_a_target_once(
    length: int, context: int, batch_size: int, seed: int
) -> None:
    batches = TextBatches(torch.arange(length), context, batch_size, seed)
    for pass_index in (0, 1):
        got = [batches.get(pass_index, index) for index in range(len(batches))]
        inputs, targets = (torch.cat(parts) for parts in zip(*got, strict=True))
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (len(batches) * batch_size, context)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert len(inputs.unique()) == inputs.numel()
        # Left out: less than two windows at the ends, and what fills no batch.
        assert length - inputs.numel() < 2 * context + (batch_size - 1) * context + 1


@given(**sizes, order=st.permutations(range(4)))
def test_a_batch_depends_on_seed_pass_and_number_alone(
    length: int, context: int, batch_size: int, order: list[int]
) -> None:
    tokens = torch.arange(length)
    first, second = (TextBatches(tokens, context, batch_size, 3) for _ in range(2))
    expected = {(p, b): first.get(p, b) for p in range(4) for b in range(min(len(first), 3))}
    for pass_index in order:
        for index in reversed(range(min(len(second), 3))):
            for a, b in zip(second.get(pass_index, index), expected[pass_index, index], strict=True):
                assert torch.equal(a, b)


def test_passes_and_seeds_differ_in_start_and_order() -> None:
    tokens = torch.arange(1000)
    starts = [TextBatches(tokens, 16, 8, seed).starts(p, 0) for seed in (0, 1) for p in (0, 1, 2)]
    assert len({tuple(s.tolist()) for s in starts}) == 6
    assert len({int(s[0]) % 16 for s in starts}) > 2, "each pass cuts the text elsewhere"


@given(world_size=st.integers(1, 4), per_rank=st.integers(1, 3))
def test_the_slices_of_the_ranks_are_the_batch_of_one_process(world_size: int, per_rank: int) -> None:
    tokens, size = torch.randint(256, (400,), dtype=torch.uint8), world_size * per_rank
    one = TextBatches(tokens, 8, size, 0)
    many = [TextBatches(tokens, 8, size, 0, rank, world_size) for rank in range(world_size)]
    for index in range(len(one)):
        for whole_batch, *slices in zip(one.get(1, index), *(b.get(1, index) for b in many), strict=True):
            assert torch.equal(torch.cat(slices), whole_batch)


@given(length=st.integers(0, 100), context=st.integers(1, 12))
def test_ordered_windows_do_not_overlap(length: int, context: int) -> None:
    inputs, targets = ordered_windows(torch.arange(length), context)
    assert inputs.shape == targets.shape == (max(length - 1, 0) // context, context)
    assert inputs.flatten().tolist() == list(range(inputs.numel()))
    assert torch.equal(targets, inputs + 1)


def test_batches_that_cannot_be_are_refused() -> None:
    tokens = torch.zeros(100, dtype=torch.uint8)
    for options, words in (
        ((0, 4, 0), "context is 0"),
        ((8, 12, 0), "only 11 windows of 8"),
        ((8, 0, 0), "positive multiple"),
        ((8, 3, 0, 0, 2), "multiple of the 2"),
        ((8, 4, 0, 2, 2), "rank 2 of 2"),
    ):
        with pytest.raises(ValueError, match=words):
            TextBatches(tokens, *options)
    batches = TextBatches(tokens, 8, 4, 0)
    for place in ((-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError, match="does not exist"):
            batches.get(*place)
