"""ONNX files: every kind of model and every prefix computes what PyTorch computes, and predicts without PyTorch's help.

Shapes: B batch, T tokens, N classes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.utils
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import paradepth
from commands import call
from paradepth.data import ByteTokenizer, WordVocabulary
from paradepth.export import ExportMismatch, OnnxModel, export_onnx
from paradepth.export.graph import build_graph
from paradepth.export.verify import verify
from paradepth.models import HFClassifier, HFClassifierConfig, TrunkModel

TOLERANCE = 1e-4
WORDS = WordVocabulary(["the", "dog"], buckets=50)
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "mlp": 32, "depth": 1}
SPECIAL = {"vocab_size": 260, "pad": 256, "context": 12, **SMALL}  # of bytes
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "image_classifier": (
        "paraformer_nano",
        {**SMALL, "image_size": (9, 8), "patch_size": 4, "channels": 1, "embedding": "convolutions", "pool": "cls"},
    ),
    "causal_lm": ("gpt_nano", {**SMALL, "context": 12, "dropout": 0.5, "aggregate": "sum"}),
    "masked_lm": ("bert_nano", SPECIAL),
    "sequence_classifier": ("text_classifier_nano", {**SPECIAL, "class_names": ("bad", "good")}),
    "tagger": (
        "tagger_nano",
        {
            **SMALL,
            "vocab_size": WORDS.size,
            "context": 12,
            "num_classes": 2,
            "class_names": ("DET", "NOUN"),
            "step": 0.5,
        },
    ),
    "translator": ("translator_nano", {**SPECIAL, "bias": False}),
}


def randomised(model: TrunkModel) -> TrunkModel:
    """With large weights everywhere, so that an output that is forgotten shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if model.model_type == "image_classifier":
            model.stem.set_normalisation([0.3], [0.6])
    return model.eval()


def build(kind: str, *, branches: int) -> TrunkModel:
    name, shape = KINDS[kind]
    if kind == "image_classifier" and not branches:
        name = "vit_nano"
    return randomised(paradepth.create_model(name, **shape, **({"branches": branches} if branches else {})))


def save(model: TrunkModel, folder: Path) -> Path:
    """As a run has it."""
    model.save_pretrained(folder)
    if model.model_type == "tagger":
        WORDS.save(folder)
    elif model.model_type != "image_classifier":
        ByteTokenizer(special=model.model_type != "causal_lm").save(folder)
    return folder


class Files:
    """Exported files, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[str, int], tuple[TrunkModel, Path]] = {}

    def get(self, kind: str, branches: int = 2) -> tuple[TrunkModel, Path]:
        """The model, and its file with all prefixes."""
        if (kind, branches) not in self.made:
            torch.manual_seed(0)
            model = build(kind, branches=branches)
            run = save(model, self.folder / f"{kind}{branches}")
            export_onnx(model, run / "model.onnx", prefixes=branches > 0, assets=run)
            self.made[kind, branches] = model, run / "model.onnx"
        return self.made[kind, branches]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("onnx"))


def compare(model: TrunkModel, exported: OnnxModel, *, batch: int, share: float, seed: int) -> None:
    inputs: Any = build_graph(model).sample(batch, share=share, seed=seed)
    inputs = inputs[0] if len(inputs) == 1 else inputs
    for k in range(1, model.prefixes + 1):
        branches = k if model.config.branches else None
        want, got = model(inputs, branches=branches), exported(inputs, branches=branches)
        assert want.shape == got.shape
        assert (want - got).abs().max() <= TOLERANCE
    assert (model.prefix_logits(inputs) - exported.prefix_logits(inputs)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("branches", [2, 0], ids=["branches", "serial"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_of_every_kind_of_model_computes_what_pytorch_computes(
    kind: str, branches: int, files: Files
) -> None:
    model, path = files.get(kind, branches)
    exported = OnnxModel(path, threads=1)
    assert exported.prefixes == max(branches, 1)
    for seed, (batch, share) in enumerate([(1, 1.0), (4, 0.0), (7, 0.6)]):
        compare(model, exported, batch=batch, share=share, seed=seed)


def test_encoders_of_transformers_compute_what_pytorch_computes(tmp_path: Path) -> None:
    hf = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf |= {"intermediate_size": 32, "max_position_embeddings": 16, "type_vocab_size": 2, "pad_token_id": 0}
    model = randomised(HFClassifier(HFClassifierConfig(hf=hf, context=12, pad=0, separator=2)))
    done = export_onnx(model, tmp_path / "model.onnx")
    compare(model, OnnxModel(done.path), batch=4, share=0.7, seed=5)


@settings(max_examples=15)
@given(batch=st.integers(1, 6), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_batch_and_length_are_free(files: Files, batch: int, share: float, seed: int) -> None:
    model, path = files.get("sequence_classifier")
    compare(model, OnnxModel(path, threads=1), batch=batch, share=share, seed=seed)


def test_branches_side_by_side_compute_the_same(files: Files) -> None:
    model, path = files.get("causal_lm")
    compare(model, OnnxModel(path, threads=2, execution="parallel"), batch=3, share=1.0, seed=1)


def test_a_prefix_can_be_cut_out_of_the_file_with_its_branches_and_no_others(files: Files, tmp_path: Path) -> None:
    model, path = files.get("image_classifier")
    images = torch.rand(3, 1, 9, 8)
    for k in (1, 2):
        cut = tmp_path / f"{k}.onnx"
        onnx.utils.extract_model(path, cut, ["images"], [f"logits_{k}"])
        names = [tensor.name for tensor in onnx.load(cut).graph.initializer]
        assert {i for i in range(2) if any(f"trunk.branches.{i}." in name for name in names)} == set(range(k))
        (logits,) = ort.InferenceSession(cut).run(None, {"images": images.numpy()})
        assert (torch.from_numpy(logits) - model(images, branches=k)).abs().max() <= TOLERANCE


def test_a_fixed_number_of_branches_leaves_the_others_out(files: Files, tmp_path: Path) -> None:
    model, whole = files.get("image_classifier")
    done = export_onnx(model, tmp_path / "1.onnx", branches=1)
    exported = OnnxModel(done.path)
    images = torch.rand(3, 1, 9, 8)
    assert (exported(images) - model(images, branches=1)).abs().max() <= TOLERANCE
    assert torch.equal(exported(images, branches=1), exported(images))
    with pytest.raises(ValueError, match="branches is 2; this file was made with 1"):
        exported(images, branches=2)
    assert not any("branches.1." in tensor.name for tensor in onnx.load(done.path).graph.initializer)
    assert any("branches.1." in tensor.name for tensor in onnx.load(whole).graph.initializer)


def test_a_file_says_what_it_is(files: Files) -> None:
    _, path = files.get("image_classifier")
    loaded = onnx.load(path)
    told = json.loads({entry.key: entry.value for entry in loaded.metadata_props}["paradepth"])
    assert told["format_version"] == 1
    assert told["paradepth"] == paradepth.__version__
    assert (told["task"], told["model_type"]) == ("classify an image", "image_classifier")
    assert told["preprocessing"]["image_size"] == [9, 8]
    assert told["preprocessing"]["mean"] == pytest.approx([0.3])
    assert told["preprocessing"]["std"] == pytest.approx([0.6])
    sizes = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in loaded.graph.input]
    assert sizes == [["batch", 1, 9, 8]]
    text = OnnxModel(files.get("sequence_classifier")[1])
    assert text.description["classes"] == ["bad", "good"]
    assert text.tokenizer().encode("hé") == ByteTokenizer(special=True).encode("hé")
    assert text.description["inputs"][0]["shape"] == ["batch", "tokens"]


def test_what_does_not_agree_is_not_written(tmp_path: Path) -> None:
    model = build("causal_lm", branches=0)
    graph = build_graph(model)
    with pytest.raises(ExportMismatch, match=r"logits differs from PyTorch's by 0\.0002"):
        verify(graph, lambda inputs: [graph.run(inputs)[0] + 2e-4])
    with pytest.raises(ExportMismatch, match="by nan"):
        verify(graph, lambda inputs: [graph.run(inputs)[0] * float("nan")])
    with pytest.raises(ExportMismatch, match="has shape"):
        verify(graph, lambda inputs: [graph.run(inputs)[0][:1, :1]])
    target = tmp_path / "model.onnx"
    target.write_bytes(b"before")
    with pytest.raises(ExportMismatch, match="nothing was written"):
        export_onnx(model, target, overwrite=True, tolerance=1e-12)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.onnx", b"before")]


def test_the_model_is_left_alone() -> None:
    model = build("image_classifier", branches=2).double().train()
    state, executor = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.trunk.executor
    before = torch.random.get_rng_state()
    graph = build_graph(model)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (model.training, model.trunk.executor) == (True, executor)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    images = torch.rand(2, 1, 9, 8)
    assert graph.run((images,))[0].dtype == torch.float32
    torch.testing.assert_close(graph.run((images,))[0], model(images.double()).float())


def test_bad_input_is_refused(files: Files, tmp_path: Path) -> None:
    model = build("image_classifier", branches=2)
    serial = build("image_classifier", branches=0)
    taken = tmp_path / "taken.onnx"
    taken.write_bytes(b"")
    cases: list[tuple[TrunkModel, Path, dict[str, Any], str]] = [
        (model, tmp_path / "a.onnx", {"branches": 3}, "branches is 3; this model has 2"),
        (serial, tmp_path / "a.onnx", {"prefixes": True}, "serial stack"),
        (model, tmp_path / "a.pt", {}, "ends in .onnx"),
        (model, taken, {}, "exists"),
    ]
    for given_model, place, options, said in cases:
        with pytest.raises(ValueError, match=said):
            export_onnx(given_model, place, **options)
    _, path = files.get("sequence_classifier")
    exported = OnnxModel(path)
    for inputs, said in (
        (torch.zeros(2, 13, dtype=torch.int64), r"shape \(2, 13\).*at most 12"),
        (torch.zeros(2, 0, dtype=torch.int64), "shape"),
        (torch.zeros(2, 3), "whole numbers"),
        (torch.full((2, 3), 260), "0 to 259"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "2 inputs"),
    ):
        with pytest.raises(ValueError, match=said):
            exported(inputs)
    with pytest.raises(ValueError, match="branches is 4; this file has 2"):
        exported(torch.ones(1, 3, dtype=torch.int64), branches=4)
    with pytest.raises(ValueError, match=r"without tokenizer\.json"):
        OnnxModel(files.get("image_classifier")[1]).tokenizer()


def test_a_missing_package_is_named(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = files.get("image_classifier")
    model = build("image_classifier", branches=0)
    for package in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=rf"package {package}; install it with: pip install 'paradepth\[export\]'"):
            export_onnx(model, tmp_path / "model.onnx")
        monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="package onnxruntime"):
        OnnxModel(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    strange = tmp_path / "strange.onnx"
    strange.write_bytes(b"\x00\x01 no model")
    with pytest.raises(ValueError, match="not an ONNX file"):
        OnnxModel(strange)
    with pytest.raises(ValueError, match="no such file"):
        OnnxModel(tmp_path / "missing.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [value], [other]), opset_imports=opset, ir_version=9
    )
    for content, said in (
        (None, "not exported by paradepth"),
        ("{}", "damaged"),
        (json.dumps({"format_version": 99, "model_type": "x", "model": {}, "inputs": [], "outputs": []}), "version 99"),
        (json.dumps({"format_version": 1, "model_type": "x", "model": {}, "inputs": [], "outputs": []}), "damaged"),
    ):
        del model.metadata_props[:]
        if content is not None:
            model.metadata_props.add(key="paradepth", value=content)
        onnx.save(model, strange)
        with pytest.raises(ValueError, match=said):
            OnnxModel(strange)


# ---- predict ---------------------------------------------------------------------------------------------------

ABSENT = (
    "conllu datasets jinja2 kornia matplotlib onnx onnxscript pyarrow rich sacrebleu sklearn tensorboard torchdata "
    "torchmetrics transformers"
)


def test_predict_needs_no_package_for_training(files: Files, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20), dtype=np.uint8)).save(picture)
    calls = [
        ("image_classifier", [picture, "--top", 3]),
        ("sequence_classifier", ["fine", "a long text that is cut", "--top", 2]),
        ("sequence_classifier", ["one", "two", "--pairs", "--branches", 1]),
        ("masked_lm", ["a <mask>b", "--top", 3]),
        ("tagger", ["the dog", "the other dogs", "--branches", 1]),
    ]
    commands = [
        ["predict", str(place), *map(str, words), "--json"]
        for kind, words in calls
        for place in (files.get(kind)[1], files.get(kind)[1].parent)
    ]
    script = (
        "import sys, warnings\n"
        f"sys.modules.update(dict.fromkeys({ABSENT.split()!r}))\n"
        "from paradepth.cli import main\n"
        f"for words in {commands!r}:\n"
        "    assert main(words) == 0, words\n"
        "assert main(['train', 'digits_paraformer']) == 2\n"
        "assert main(['--help']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "refused: train needs the package" in done.stderr
    assert "  predict    classify images" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = [json.loads(line)["predictions"] for line in lines]
    assert len(found) == len(commands)
    for (kind, _), exported, run in zip(calls, found[::2], found[1::2], strict=True):
        assert flat(exported) == pytest.approx(flat(run), abs=1e-5), kind


def flat(item: Any) -> dict[str, Any]:
    """Leaves by path."""
    if isinstance(item, dict | list):
        pairs = item.items() if isinstance(item, dict) else enumerate(item)
        return {f"{name}/{path}": leaf for name, part in pairs for path, leaf in flat(part).items()}
    return {"": item}


def test_predict_refuses_what_a_file_cannot_do(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(files.get("image_classifier")[1].read_bytes()[:1000])
    picture, notes = tmp_path / "picture.png", tmp_path / "notes.txt"
    Image.new("L", (9, 8)).save(picture)
    notes.write_text("no picture")
    bare = tmp_path / "bare.onnx"
    exported = onnx.load(files.get("sequence_classifier")[1])
    exported.metadata_props.remove(next(entry for entry in exported.metadata_props if entry.key == "tokenizer.json"))
    onnx.save(exported, bare)
    for words, said in (
        ([files.get("image_classifier")[1], notes], "notes.txt"),
        ([files.get("image_classifier")[1], picture, "--branches", 4], "branches is 4"),
        ([files.get("image_classifier")[1], "some text", "--pairs"], "pairs"),
        ([files.get("causal_lm")[1], "text"], "causal_lm"),
        ([files.get("translator")[1], "text"], "translator"),
        ([damaged, "text"], "not an ONNX file"),
        ([notes, "text"], "not an ONNX file"),
        ([tmp_path / "missing.onnx", "text"], "no such file"),
        ([bare, "text"], "without tokenizer.json"),
    ):
        status, _, error = call(capsys, "predict", *words)
        assert (status, "refused" in error, said in error) == (2, True, True), error
