"""Classification of texts: oracles in float64, scores against scikit-learn, reading of tables, and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor

import paradepth
from commands import answer
from paradepth.cli import main
from paradepth.data.labelled import GLUE, encoded, load_labelled
from paradepth.data.labelled_files import read_rows
from paradepth.data.tokenizer import ByteTokenizer
from paradepth.models import SequenceClassifier
from paradepth.nn import SegmentStem, TextClassifierHead, TokenStem
from paradepth.train import Config, resume_run, start_run
from paradepth.train.tasks import load_data
from paradepth.train.tasks.classify import f1, matthews
from runs import Stop, events, stop_at

PAD, FIRST, LAST = 0, 1, 2
shapes = st.sampled_from(
    [
        {"depth": 3, "pool": "cls"},
        {"depth": 2, "pool": "mean", "segments": 1},
        {"depth": 2, "pool": "last", "causal": True},
        {"branches": 3, "depth": 1, "pool": "mean"},
        {"branches": 2, "depth": 2, "pool": "cls", "aggregate": "sum"},
    ]
)


def classifier(**options: Any) -> SequenceClassifier:
    small = {"vocab_size": 19, "pad": PAD, "separator": LAST, "context": 9, "width": 8, "heads": 2, "mlp": 16}
    model = paradepth.create_model("text_classifier_nano", **{**small, "num_classes": 3, **options}).double().eval()
    if isinstance(model.stem, SegmentStem):  # as if trained
        torch.nn.init.normal_(model.stem.segments.weight)
    return model


def samples(lengths: list[int]) -> Tensor:
    rows = [torch.cat([torch.tensor([FIRST]), torch.randint(2, 19, (n - 1,))]) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ---- the model ---------------------------------------------------------------------------------------------------


@given(shape=shapes, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_padding_changes_nothing_and_prefixes_are_truncated_models(shape: dict, lengths: list[int]) -> None:
    model, tokens_BT = classifier(**shape), samples(lengths)
    together = model.prefix_logits(tokens_BT)
    assert together.shape == (model.prefixes, len(lengths), 3)
    for row, length in enumerate(lengths):
        close(together[:, row], model.prefix_logits(tokens_BT[row : row + 1, :length])[:, 0])
    for k in range(1, model.prefixes + 1):
        close(model(tokens_BT, branches=k), together[k - 1])
        if model.config.branches:
            close(model.truncate(k)(tokens_BT), together[k - 1])


def test_pooling_takes_what_it_says() -> None:
    x, real = torch.randn(2, 4, 8), torch.tensor([[True] * 3 + [False], [True] * 4])
    heads = {pool: TextClassifierHead(8, 3, pool=pool) for pool in ("cls", "mean", "last")}
    for head in heads.values():
        head.load_state_dict(heads["cls"].state_dict())
    norm = heads["cls"].norm(x)

    def classified(pooled: Tensor) -> Tensor:
        return heads["cls"].classify(torch.tanh(heads["cls"].pooler(pooled)))

    torch.testing.assert_close(heads["cls"](x, real), classified(norm[:, 0]))
    torch.testing.assert_close(heads["mean"](x, real), classified(torch.stack([norm[0, :3].mean(0), norm[1].mean(0)])))
    torch.testing.assert_close(heads["last"](x, real), classified(torch.stack([norm[0, 2], norm[1, 3]])))
    with pytest.raises(ValueError, match="pool is 'max'"):
        TextClassifierHead(8, 3, pool="max")  # pyright: ignore[reportArgumentType]


def test_segments_start_as_nothing_and_then_tell_texts_apart() -> None:
    stem = SegmentStem(19, 9, 8, segments=2, separator=LAST)
    plain = TokenStem(19, 9, 8)
    plain.load_state_dict({k: v for k, v in stem.state_dict().items() if k != "segments.weight"})
    pair = torch.tensor([[FIRST, 5, LAST, 6, LAST, PAD]])
    assert torch.equal(stem(pair), plain(pair))
    assert stem.segments_of(pair).tolist() == [[0, 0, 0, 1, 1, 1]]
    torch.nn.init.normal_(stem.segments.weight)
    torch.testing.assert_close(stem(pair) - plain(pair), stem.segments.weight[stem.segments_of(pair)])
    for bad, words in (({"segments": 1}, "segments is 1"), ({"separator": 19}, "separator is 19")):
        with pytest.raises(ValueError, match=words):
            SegmentStem(19, 9, 8, **{"segments": 2, "separator": 2, **bad})
    with pytest.raises(ValueError, match="start is 3"):
        stem(pair, start=3)


def test_shapes_that_make_no_sense_are_refused() -> None:
    for options, words in (
        ({"causal": True, "pool": "cls"}, "take 'last' or 'mean'"),
        ({"class_names": ("a",)}, "1 class names for num_classes 3"),
        ({"segments": 0}, "segments is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            classifier(**options)


# ---- scores ------------------------------------------------------------------------------------------------------


@given(classes=st.integers(2, 4), seed=st.integers(0, 1000), skew=st.booleans())
def test_scores_are_scikit_learns(classes: int, seed: int, skew: bool) -> None:
    draws = torch.Generator().manual_seed(seed)
    truth, guess = torch.randint(classes, (2, 30), generator=draws)
    if skew:
        guess = guess.clamp(max=1)
        truth = torch.where(torch.rand(30, generator=draws) < 0.5, guess, truth)
    confusion = (truth * classes + guess).bincount(minlength=classes**2).view(classes, classes)
    average = "binary" if classes == 2 else "macro"
    labels = None if classes == 2 else list(range(classes))
    wanted = f1_score(truth, guess, average=average, labels=labels, zero_division=0.0)  # pyright: ignore
    assert f1(confusion) == pytest.approx(wanted, abs=1e-12)
    assert matthews(confusion) == pytest.approx(matthews_corrcoef(truth, guess), abs=1e-12)


# ---- reading -----------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sst2(folder: Path, train: int = 60, *, test_labels: int | None = None) -> Path:
    def rows(n: int) -> list[dict[str, Any]]:
        return [{"sentence": f"{('bad', 'good')[i % 2]} film {i}", "label": i % 2, "idx": i} for i in range(n)]

    write_jsonl(folder / "sst2" / "train.jsonl", rows(train))
    write_jsonl(folder / "sst2" / "validation.jsonl", rows(10))
    if test_labels is not None:
        write_jsonl(folder / "sst2" / "test.jsonl", [row | {"label": test_labels} for row in rows(6)])
    return folder


@pytest.mark.parametrize("test_labels", [None, -1, 1])
def test_glue_tests_on_what_has_labels(tmp_path: Path, test_labels: int | None) -> None:
    data = load_labelled(
        "sst2", context=20, data_dir=sst2(tmp_path, test_labels=test_labels), tokenizer="bytes", validation_fraction=0.1
    )
    assert data.class_names == ("negative", "positive")
    sizes = {name: len(split) for name, split in data.splits.items()}
    if test_labels == 1:
        assert sizes == {"train": 60, "validation": 10, "test": 6}
        assert data.notes == ()
    else:
        assert sizes == {"train": 54, "validation": 6, "test": 10}
        assert len(data.notes) == 2
        assert {text for (text,) in data.splits["validation"].texts}.isdisjoint(
            {text for (text,) in data.splits["train"].texts}
        )
    split = data.splits["train"]
    for text, label in zip(split.texts, split.labels_N.tolist(), strict=True):
        assert text[0].startswith(("bad", "good")[label])
    tokens, labels = split.batch(torch.tensor([0, 1]), pad=256)
    assert labels.tolist() == split.labels_N[:2].tolist()
    row = tokens[0][tokens[0] != 256].tolist()
    assert row == [257, *split.texts[0][0].encode(), 258]


def test_every_glue_task_reads_its_columns(tmp_path: Path) -> None:
    for name, glue in GLUE.items():
        rows = [
            {**{column: f"{column} {i}" for column in glue.columns}, "label": i % len(glue.classes)} for i in range(30)
        ]
        for split in ("train", glue.validation, *glue.other):
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
        data = load_labelled(name, context=64, data_dir=tmp_path, tokenizer="bytes")
        assert data.pairs == (len(glue.columns) == 2)
        assert len(data.class_names) == len(glue.classes)
        assert ("mismatched" in data.splits) == (name == "mnli")
        if data.pairs:
            assert int((data.splits["test"].tokens[0] == 258).sum()) == 2
    with pytest.raises(ValueError, match="those of mnli are known"):
        load_labelled("mnli", context=64, data_dir=tmp_path, columns=("a", "b"))
    (tmp_path / "mnli" / "validation_matched.jsonl").unlink()
    with pytest.raises(ValueError, match="neither a validation_matched split nor"):
        load_labelled("mnli", context=64, data_dir=tmp_path)


def test_tables_of_ones_own(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"a": f'say "{i}",\nplease', "b": f"ü{i}", "kind": ("no", "yes", "maybe")[i % 3]} for i in range(30)]
    quoted = "".join('"' + r["a"].replace('"', '""') + f'",{r["b"]},{r["kind"]}\n' for r in rows)
    (tmp_path / "t.csv").write_text("\ufeffa,b,kind\n" + quoted, encoding="utf-8")
    write_jsonl(tmp_path / "t.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = [
        load_labelled(
            "labelled", context=64, data_dir=tmp_path / f"t.{end}", columns=("a", "b", "kind"), tokenizer="bytes"
        )
        for end in ("csv", "jsonl", "parquet")
    ]
    for data in found:
        assert data.class_names == ("maybe", "no", "yes")
        assert {name: split.texts for name, split in data.splits.items()} == {
            name: split.texts for name, split in found[0].splits.items()
        }
        assert sum(map(len, data.splits.values())) == 30
    stars = write_jsonl(tmp_path / "stars.jsonl", [{"text": "x", "label": i % 3 * 5 + 5} for i in range(30)])
    assert load_labelled("labelled", context=9, data_dir=stars, tokenizer="bytes").class_names == ("5", "10", "15")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", "has no column 'text'; it has none"),
        ("t.csv", b"text,label\n", "has no rows"),
        ("t.csv", b"text,kind\na,b\n", "has no column 'label'; it has 'text', 'kind'"),
        ("t.csv", b"text,label\na,b\nc\n", "line 3 has 1 fields"),
        ("t.csv", b"text,label\na,b\nc,d,e\n", "line 3 has 3 fields"),
        ("t.csv", "text,label\nfür,b\n".encode("latin-1"), "not UTF-8 at byte 12"),
        ("t.csv", b"text,label\na,b\nc,\n", "row 3: the label is '', but must be a name"),
        ("t.csv", b"text,label\na,b\nc,b\n", "all rows have the label 'b'"),
        ("t.csv", b"label,text\n0,b\n1,c\n2,d\n3,e\n", "is this the label column"),
        ("t.jsonl", b'{"text": "a", "label": 0}\n{"text": "a"', "line 2 is not JSON"),
        ("t.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("t.jsonl", b'{"label": 0}\n', "row 1 has no 'text'; it has label"),
        ("t.jsonl", b'{"text": 3, "label": 0}\n', "row 1: text is 3, but must be a text"),
        ("t.jsonl", b'{"text": "a", "label": 0.5}\n', "row 1: the label is 0.5"),
        ("t.parquet", b"PAR", "cannot be read as parquet"),
    ],
)
def test_damaged_tables_are_refused_in_words(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_labelled("labelled", context=9, data_dir=tmp_path / name, tokenizer="bytes")


def test_labels_and_places_that_are_not_known_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": ("no", "yes")[i % 2]} for i in range(20)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "x", "label": "perhaps"}])
    with pytest.raises(ValueError, match=r"validation\.jsonl, row 1: unknown label 'perhaps'; known are no, yes"):
        load_labelled("labelled", context=9, data_dir=tmp_path)
    write_jsonl(tmp_path / "sst2" / "train.jsonl", [{"sentence": "x", "label": 2}])
    write_jsonl(tmp_path / "sst2" / "validation.jsonl", [{"sentence": "x", "label": 0}])
    with pytest.raises(ValueError, match="unknown label '2'; known are negative, positive"):
        load_labelled("sst2", context=9, data_dir=tmp_path)
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    for options, words in (
        ({}, r"train\.jsonl and train\.csv; one of them"),
        ({"data_dir": None}, "needs data_dir"),
        ({"data_dir": tmp_path / "none"}, "neither a file nor a folder"),
        ({"data_dir": tmp_path / "sst2", "columns": ("a",)}, "name the text column"),
        ({"validation_fraction": 0.5}, "validation_fraction is 0.5"),
        ({"data_dir": tmp_path / "sst2", "columns": ("sentence", "label")}, "all rows have the label '2'"),
    ):
        with pytest.raises(ValueError, match=words):
            load_labelled("labelled", **{"context": 9, "data_dir": tmp_path, **options})
    with pytest.raises(ValueError, match="no data 'cola' in"):
        load_labelled("cola", context=9, data_dir=tmp_path / "sst2" / "deeper")
    with pytest.raises(ValueError, match=r"cannot get nyu-mll/glue cola.*--data-dir"):
        load_labelled("cola", context=9)
    with pytest.raises(ValueError, match="context is 2"):
        encoded([("x",)], ByteTokenizer(special=True), 2)
    with pytest.raises(ValueError, match="no <s>"):
        encoded([("x",)], ByteTokenizer(), 9)


@given(lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4))
def test_long_pairs_are_cut_at_the_longer_text(lengths: list[tuple[int, int]]) -> None:
    room = 12
    texts = [("a" * i, "b" * j) for i, j in lengths]
    long = sum(i + j > room for i, j in lengths)
    tokenizer = ByteTokenizer(special=True)
    if long:
        with pytest.warns(UserWarning, match=f"{long} of {len(texts)} texts are longer than the model's 15 tokens"):
            found = encoded(texts, tokenizer, room + 3)
    else:
        found = encoded(texts, tokenizer, room + 3)
    for index, (i, j) in enumerate(lengths):
        text = found[index].tolist()
        a, b = text.count(ord("a")), text.count(ord("b"))
        assert text == [257, *b"a" * a, 258, *b"b" * b, 258]
        assert (a, b) == (i, j) if i + j <= room else a + b == room
        assert a == i or a >= b
        assert b == j or b >= a - 1


# ---- runs --------------------------------------------------------------------------------------------------------


def config(place: Path, **options: Any) -> Config:
    chosen: dict[str, Any] = {
        "model": "text_classifier_nano",
        "branches": 2,
        "depth": 1,
        "width": 16,
        "mlp": 32,
        "context": 32,
        "data": "sst2",
        "data_dir": place,
        "tokenizer": "bytes",
        "dropout": 0.1,
        "budget": "20 steps",
        "batch_size": 16,
        "learning_rate": 3e-3,
        "validations": 2,
        "precision": "float32",
        "device": "cpu",
        **options,
    }
    return Config().replace(**chosen)


def test_a_run_learns_and_tells_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place, run = sst2(tmp_path), tmp_path / "run"
    summary = start_run(config(place, budget="60 steps", schedule="one_pass"), run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["accuracy"][-1] == 1.0  # "good" against "bad"
    assert summary["f1"] == evaluation["f1"]
    assert summary["matthews"] == evaluation["matthews"]
    assert evaluation["confusion"] == [[5, 0], [0, 5]]
    assert evaluation["class_names"] == ["negative", "positive"]
    assert len(evaluation["notes"]) == 2
    example = evaluation["examples"][0]
    assert set(example) == {"text", "label", "prediction", "confidence", "by_prefix"}
    for event in events(run, "validation"):
        assert len(event["f1"]) == len(event["matthews"]) == len(event["accuracy"]) == 2

    again = answer(capsys, "evaluate", run)
    assert again["matthews"] == evaluation["matthews"]
    found = answer(capsys, "predict", run, "good film", "bad film", "--top", "2")["predictions"]
    assert [item["classes"][0]["class"] for item in found] == ["positive", "negative"]
    assert sum(c["confidence"] for c in found[0]["classes"]) == pytest.approx(1.0)
    assert main(["predict", str(run), "good film"]) == 0
    assert "good film: positive" in capsys.readouterr().out
    for arguments, words in (
        (["a", "--top", "3"], "top is 3"),
        (["a", "b", "c", "--pairs"], "even number"),
        ([], "at least one text"),
        (["a", "--branches", "3"], "branches is 3"),
    ):
        assert main(["predict", str(run), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert main(["evaluate", str(run), "--split", "mismatched"]) == 2
    assert "no split 'mismatched'; it has train, validation, test" in capsys.readouterr().err
    assert main(["report", str(run), "--json"]) == 0


def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    stop = stop_at(8)

    options = config(sst2(tmp_path), checkpoint_every=5, executor="serial")
    start_run(options, tmp_path / "whole")
    with pytest.raises(Stop):
        start_run(options, tmp_path / "cut", on_batch=stop)
    resume_run(tmp_path / "cut")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert events(tmp_path / "whole", "validation") == events(tmp_path / "cut", "validation")


def test_mnli_has_a_mismatched_test(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split, count in (("train", 60), ("validation_matched", 9), ("validation_mismatched", 12)):
        rows = [{"premise": f"p {i}", "hypothesis": "h", "label": i % 3} for i in range(count)]
        write_jsonl(tmp_path / "mnli" / f"{split}.jsonl", rows)
    start_run(config(tmp_path, data="mnli", budget="2 steps", validations=1), tmp_path / "run")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["samples"] == 9
    assert evaluation["mismatched"]["samples"] == 12
    assert len(evaluation["mismatched"]["accuracy"]) == 2
    assert isinstance(evaluation["examples"][0]["text"], list)
    found = answer(capsys, "evaluate", tmp_path / "run", "--split", "mismatched")
    assert found["accuracy"] == evaluation["mismatched"]["accuracy"]
    assert answer(capsys, "predict", tmp_path / "run", "p 1", "h", "--pairs")["predictions"][0]["text"] == ["p 1", "h"]


def test_batches_hold_every_sample_once_and_scores_add_up(tmp_path: Path) -> None:
    from paradepth.distributed import World

    task = load_data(config(sst2(tmp_path)))
    batches = task.batches(World(0, 1, torch.device("cpu")))
    labels = torch.cat([batches.get(0, i)[1] for i in range(len(batches))])
    assert len(labels) == task.count("train") // 16 * 16
    logits, targets = torch.randn(2, 10, 2), torch.randint(2, (10,))
    whole = task.tally(logits, targets)
    parts = task.tally(logits[:, :4], targets[:4]) + task.tally(logits[:, 4:], targets[4:])
    assert torch.equal(whole, parts)
    guesses = logits.argmax(-1)
    wanted = [matthews_corrcoef(targets, guess) for guess in guesses]
    assert task.scores(whole)["matthews"] == pytest.approx(wanted)


def test_rows_know_where_they_stand(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,label\n"two\nlines",0\nb,1\n')
    assert read_rows(tmp_path / "t.csv", ("text", "label")).numbers == [3, 4]
