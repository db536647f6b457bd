"""Oracles of the branches trunk and the classifier, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import paradepth
from paradepth.branches import Branches
from paradepth.depth import Stack
from paradepth.models import ImageClassifier, list_models, model_config
from paradepth.models.pretrained import push_to_hub
from paradepth.nn import EncoderLayer

shapes = st.fixed_dictionaries(
    {
        "branches": st.integers(1, 4),
        "depth": st.integers(1, 3),
        "aggregate": st.sampled_from(["residual", "sum"]),
        "pool": st.sampled_from(["cls", "mean"]),
        "step": st.sampled_from([1.0, 0.25]),
    }
)


def classifier(**options: object) -> ImageClassifier:
    small = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 8, "heads": 2, "mlp": 16, "num_classes": 3}
    return paradepth.create_model("paraformer_nano", **{**small, **options}).double().eval()


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 1, 8, 8, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@given(shape=shapes)
def test_prefix_k_is_the_defining_sum_and_the_truncated_model(shape: dict) -> None:
    model, x = classifier(**shape), images()
    trunk = model.trunk
    assert isinstance(trunk, Branches)
    state = model.stem(x)
    outputs = [branch(state) for branch in trunk.branches]
    logits = model.prefix_logits(x)
    assert logits.shape[0] == shape["branches"]
    for k in range(1, shape["branches"] + 1):
        total = sum(outputs[:k])
        if shape["aggregate"] == "residual":
            total = state + sum(g - state for g in outputs[:k])
        close(logits[k - 1], model.head(total))
        close(logits[k - 1], model(x, branches=k))
        close(logits[k - 1], model.truncate(k)(x))
        close(model.prefix_logits(x, branches=k), logits[:k])


@given(shape=shapes)
def test_prefix_gradients_are_those_of_the_truncated_model(shape: dict) -> None:
    model, x = classifier(**shape), images()
    k = max(1, shape["branches"] - 1)
    short = model.truncate(k)
    model.prefix_logits(x)[k - 1].square().sum().backward()
    short(x).square().sum().backward()
    grads = dict(model.named_parameters())
    for name, parameter in short.named_parameters():
        grad = grads[name].grad
        assert grad is not None
        assert parameter.grad is not None
        close(grad, parameter.grad)
    for name, parameter in model.named_parameters():
        if name not in dict(short.named_parameters()):
            assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("depth", [1, 3])
def test_one_branch_is_a_vit_weight_for_weight(pool: str, depth: int) -> None:
    options = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 8, "heads": 2, "mlp": 16, "pool": pool}
    para = paradepth.create_model("paraformer_nano", branches=1, depth=depth, **options).double()
    vit = paradepth.create_model("vit_nano", depth=depth, **options).double()
    renamed = {name.replace("trunk.branches.0.", "trunk."): value for name, value in para.state_dict().items()}
    vit.load_state_dict(renamed)  # strict: same names and shapes
    x = images()
    assert torch.equal(para(x), vit(x))
    para(x).square().sum().backward()
    vit(x).square().sum().backward()
    for name, parameter in vit.named_parameters():
        twin = dict(para.named_parameters())[name.replace("trunk.", "trunk.branches.0.")]
        assert parameter.grad is not None
        assert twin.grad is not None
        close(parameter.grad, twin.grad)


@given(branches=st.integers(1, 3), more=st.integers(1, 3), depth=st.integers(1, 2))
def test_growing_leaves_outputs_exactly_unchanged_and_is_undone_by_truncation(
    branches: int, more: int, depth: int
) -> None:
    model, x = classifier(branches=branches, depth=depth), images()
    grown = model.grow(more)
    assert grown.prefixes == branches + more
    assert torch.equal(grown(x), model(x))
    assert torch.equal(grown.truncate(branches)(x), model(x))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "no shared storage"


def test_a_grown_branch_learns_and_random_growth_changes_outputs() -> None:
    model, x = classifier(branches=2), images()
    assert not torch.allclose(model.grow(1, init="random")(x), model(x))
    grown = model.grow(1).train()
    grown(x).square().sum().backward()
    new = grown.parts()["branch3"]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in new.parameters())


@given(branches=st.integers(2, 4))
def test_detached_prefix_losses_train_the_newest_branch_alone(branches: int) -> None:
    model, x = classifier(branches=branches), images()
    for k in range(1, branches + 1):
        model.zero_grad()
        model.prefix_logits(x, detach=True)[k - 1].square().sum().backward()
        for i in range(1, branches + 1):
            touched = any(p.grad is not None and bool(p.grad.any()) for p in model.parts()[f"branch{i}"].parameters())
            assert touched == (i == k)
    close(model.prefix_logits(x, detach=True), model.prefix_logits(x))


def test_contributions_are_relative_norms_of_what_each_branch_adds() -> None:
    model, x = classifier(branches=3), images()
    trunk, state = model.trunk, model.stem(x)
    assert isinstance(trunk, Branches)
    expected = torch.stack(
        [(b(state) - state).flatten(1).norm(dim=1) / state.flatten(1).norm(dim=1) for b in trunk.branches]
    )
    close(model.contributions(x), expected)


def test_masks_reach_every_branch() -> None:
    trunk = Branches([Stack([EncoderLayer(8, heads=2, mlp=16)]) for _ in range(2)]).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    mask = torch.tril(torch.ones(4, 4, dtype=torch.bool))
    changed = x.clone()
    changed[:, -1] += torch.randn(8, dtype=torch.float64)
    close(trunk(x, mask)[:, :-1], trunk(changed, mask)[:, :-1])
    assert not torch.allclose(trunk(x)[:, :-1], trunk(changed)[:, :-1])


@pytest.mark.parametrize("name", [*list_models("paraformer_*"), *list_models("vit_*")])
def test_every_registered_model_builds_runs_and_survives_saving(name: str, tmp_path: Path) -> None:
    config = model_config(name)
    model = paradepth.create_model(name, image_size=16, patch_size=8, num_classes=5).eval()
    assert model.config.width == config.width
    x = torch.rand(2, 3, 16, 16)
    logits = model(x)
    assert logits.shape == (2, 5)
    assert model.forward_flops() > 0
    again = paradepth.from_pretrained(model.save_pretrained(tmp_path))
    assert torch.equal(again(x), logits)
    assert again.config == model.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_published_shapes() -> None:
    authors = model_config("paraformer_tiny_8x2_224")
    assert (authors.branches, authors.depth, authors.image_size, authors.patch_size) == (8, 2, (224, 224), (16, 16))
    layer = paradepth.create_model("vit_tiny", depth=1).trunk.layers[0]  # pyright: ignore[reportAttributeAccessIssue]
    qkv_bias = 3 * 192  # the authors' layer has no bias in that map
    assert sum(p.numel() for p in layer.parameters()) - qkv_bias == 444_288
    assert [model_config(f"vit_{size}").width for size in ("nano", "pico", "tiny", "small")] == [64, 96, 192, 384]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: paradepth.create_model("paraformer_huge"), "unknown model"),
        (lambda: paradepth.create_model("vit_nano", colour=3), "unknown options"),
        (lambda: paradepth.create_model("vit_nano", branches=2), "serial model"),
        (lambda: paradepth.create_model("paraformer_nano", branches=0), "at least 1"),
        (lambda: paradepth.create_model("paraformer_nano", depth=0), "depth is 0"),
        (lambda: paradepth.create_model("paraformer_nano", aggregate="mean"), "'residual', 'sum' or 'gated'"),
        (lambda: paradepth.create_model("paraformer_nano", image_size=(4, 4, 4)), "image_size"),
        (lambda: paradepth.create_model("paraformer_nano", class_names=("a",)), "class names"),
        (lambda: classifier(branches=2)(images(), branches=3), "between 1 and 2"),
        (lambda: classifier(branches=2).truncate(0), "between 1 and 2"),
        (lambda: classifier(branches=2).grow(0), "nothing to grow"),
        (lambda: classifier(branches=2, aggregate="sum").grow(1), "init='random'"),
        (lambda: paradepth.create_model("vit_nano").truncate(1), "serial stack"),
        (lambda: paradepth.create_model("vit_nano")(torch.rand(1, 3, 32, 32), branches=2), "serial stack"),
        (lambda: paradepth.from_pretrained("no/such/folder"), "hub=True"),
        (lambda: Branches([]), "at least one branch"),
        (lambda: Stack([]), "at least one layer"),
        (lambda: Stack([EncoderLayer(8, heads=2, mlp=8)], step=0), "positive"),
    ],
)
def test_bad_input_is_refused_in_words(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    folder = classifier().save_pretrained(tmp_path / "model")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if not k.startswith("head")}, weights)
    with pytest.raises(ValueError, match="do not fit"):
        paradepth.from_pretrained(folder)
    weights.write_bytes(b"\x80\x04 not safetensors")
    with pytest.raises(ValueError, match="damaged"):
        paradepth.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        paradepth.from_pretrained(folder)
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text('{"model_type": "other", "model": {}}')
    with pytest.raises(ValueError, match=r"damaged|model_type"):
        paradepth.from_pretrained(folder)


def test_the_hub_is_asked_only_on_request_and_exchanges_the_same_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is out of reach of tests, so a folder stands for the repository behind huggingface_hub's two
    calls."""
    import huggingface_hub

    remote = tmp_path / "remote"
    asked: list[tuple] = []

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repository: str, **options: object) -> str:
            return f"hub/{repository}"

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            _copy(Path(folder_path), remote)

    def _copy(source: Path, target: Path) -> None:
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, tuple(allow_patterns)))
        return str(remote)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = classifier()
    assert push_to_hub(model, "someone/model") == "hub/someone/model"
    assert not asked
    again = paradepth.from_pretrained("someone/model", hub=True, revision="v1")
    assert asked == [("someone/model", "v1", ("config.json", "model.safetensors"))]
    x = images()
    assert torch.equal(again(x), model(x))
