"""Programs of torch.export, packages of AOTInductor, latencies and `paradepth export`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import paradepth
from commands import answer, call
from paradepth.cli import main
from paradepth.data import ByteTokenizer
from paradepth.export import OnnxModel, export_aoti, export_program, load_aoti, load_program
from paradepth.export.graph import build_graph
from paradepth.export.latency import measure, summary
from paradepth.models import TrunkModel

TOLERANCE = 1e-4
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "mlp": 32, "depth": 1}
BYTES = {"vocab_size": 260, "pad": 256, "context": 12}


def images(branches: int = 2) -> TrunkModel:
    name, count = ("paraformer_nano", {"branches": branches}) if branches else ("vit_nano", {})
    return paradepth.create_model(name, **SMALL, **count, image_size=8, patch_size=4, channels=1).eval()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("paraformer_nano", {"branches": 3, "image_size": 8, "patch_size": 4}),
        ("text_classifier_nano", {"branches": 2, "causal": True, "pool": "last", **BYTES}),
        ("translator_nano", {"branches": 2, **BYTES}),
    ],
)
def test_a_program_computes_what_pytorch_computes(name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    model = paradepth.create_model(name, **SMALL, **shape).eval()
    done = export_program(model, tmp_path / "model.pt2", prefixes=model.config.branches > 0)
    run, told = load_program(done.path)
    assert told["model_type"] == model.model_type
    for seed, (batch, share) in enumerate([(1, 0.0), (1, 1.0), (4, 0.5)]):
        inputs: Any = build_graph(model).sample(batch, share=share, seed=seed)
        want = model.prefix_logits(inputs[0] if len(inputs) == 1 else inputs)
        assert (torch.stack(run(*inputs)) - want).abs().max() <= TOLERANCE


def test_torch_reads_a_program_too(tmp_path: Path) -> None:
    model = images()
    export_program(model, tmp_path / "model.pt2", branches=1)
    pixels = torch.rand(3, 1, 8, 8)
    found = torch.export.load(tmp_path / "model.pt2").module()(pixels)
    assert (found[0] - model(pixels, branches=1)).abs().max() <= TOLERANCE


def test_pickled_programs_and_other_files_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    program = build_graph(images(0)).program()
    buffer = io.BytesIO()
    torch.export.save(program, buffer)  # with example inputs, which torch pickles
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="pickled parts"):
        load_program(path)
    program._example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not exported by paradepth"):
        load_program(path)
    for content in (b"", b"PK\x03\x04 half an archive", b"weights"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a program"):
            load_program(path)
    with pytest.raises(ValueError, match="no such file"):
        load_program(tmp_path / "missing.pt2")


@pytest.mark.slow
def test_a_compiled_package_computes_what_pytorch_computes(tmp_path: Path) -> None:
    model = images()
    done = export_aoti(model, tmp_path / "model.pt2", prefixes=True)
    run, told = load_aoti(done.path)
    assert told["outputs"] == ["logits_1", "logits_2"]
    for batch in (1, 5):
        pixels = torch.rand(batch, 1, 8, 8)
        assert (torch.stack(list(run(pixels))) - model.prefix_logits(pixels)).abs().max() <= TOLERANCE
    with pytest.raises(ValueError, match="AOTInductor; load it with load_aoti"):
        load_program(done.path)


def test_without_a_compiler_aoti_is_refused(tmp_path: Path) -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        # Not by monkeypatch, which cannot put an entry of this configuration back.
        with (
            config.patch({"cpp.cxx": ("no-such-compiler",)}),
            pytest.raises(ValueError, match=r"needs a C\+\+ compiler"),
        ):
            export_aoti(images(0), tmp_path / "model.pt2")
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other.pt2").write_bytes(b"other")
    with pytest.raises(ValueError, match="not a package of AOTInductor"):
        load_aoti(tmp_path / "other.pt2")


def test_candidates_are_timed_in_turns() -> None:
    called: list[str] = []
    found = measure({name: lambda n=name: called.append(n) for name in "ab"}, seconds=0.0, least=2, most=2)
    assert called == ["a", "b", *"aaaa", *"bbbb", *"bbbb", *"aaaa"]
    assert {name: len(times) for name, times in found.items()} == {"a": 6, "b": 6}
    assert summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median_ms": 3.0, "low_ms": 2.0, "high_ms": 4.0, "runs": 5}


# ---- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = paradepth.create_model("text_classifier_nano", **SMALL, **BYTES, branches=2)
    ByteTokenizer(special=True).save(model.save_pretrained(folder))
    return folder


def test_export_writes_into_the_run_and_tells_latencies(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "export", run, "--branches", 1, "--threads", 2)
    assert told["file"] == str(run / "exported" / "model-1.onnx")
    assert 0 <= told["difference"] <= TOLERANCE
    assert told["bytes"] == Path(told["file"]).stat().st_size
    ways = ["PyTorch eager", "onnxruntime sequential", "onnxruntime parallel"]
    assert [(row["batch"], row["what"]) for row in told["latency"]] == [(b, way) for b in (1, 8) for way in ways]
    for row in told["latency"]:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
    details = json.loads(Path(told["details"]).read_text())
    assert details["latency"] == told["latency"]
    assert details["machine"]["threads"] == 2
    assert details["description"]["branches"] == 1
    assert OnnxModel(told["file"]).tokenizer().vocab_size == 260
    before = Path(told["file"]).read_bytes()
    status, _, error = call(capsys, "export", run, "--branches", 1, "--no-latency")
    assert (status, "exists" in error) == (2, True)
    assert Path(told["file"]).read_bytes() == before


def test_export_of_a_program_for_people(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "model.pt2"
    status, text, _ = call(capsys, "export", run, "--format", "torch", "--prefixes", "--output", target)
    assert status == 0
    assert "outputs: logits_1, logits_2" in text
    assert "exported program" in text
    assert "difference: " in text
    assert load_program(target)[1]["assets"] == ["tokenizer.json"]
    status, _, error = call(capsys, "predict", target, "a text")
    assert (status, "not an ONNX file" in error) == (2, True)
    told = answer(capsys, "export", run, "--format", "torch", "--output", target, "--overwrite", "--no-latency")
    assert (told["outputs"], "latency" in told) == (["logits"], False)


def test_export_refuses_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    for words, said in (
        ([tmp_path / "missing"], "not a folder"),
        ([tmp_path], "has no model.safetensors"),
        ([run, "--branches", 3], "branches is 3; this model has 2"),
        ([run, "--output", tmp_path / "model.bin"], "ends in .onnx"),
        ([run, "--output", run / "config.json" / "model.onnx"], "cannot be made"),
        ([run, "--threads", 0], "threads is 0"),
    ):
        status, _, error = call(capsys, "export", *words)
        assert (status, "refused" in error, said in error) == (2, True, True), error
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--format", "tflite"])
    assert stop.value.code == 2
    from paradepth.export import export_run

    with pytest.raises(ValueError, match="format is 'tflite'; it must be one of onnx, torch, aoti"):
        export_run(run, format="tflite")  # pyright: ignore[reportArgumentType]
