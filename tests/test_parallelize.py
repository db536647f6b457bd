"""`parallelize`: existing residual stacks under every executor, with their own code, weights and arguments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import paradepth
from foreign import DEPTH, EXECUTORS, assert_close
from paradepth.depth import MGRIT, Picard, restore


class Layer(nn.Module):
    """A post-norm residual step with dropout that returns what `kind` says."""

    def __init__(self, width: int = 6, *, kind: str = "tensor", out: int | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(width, out or width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: Any = None, *, shift: Any = None) -> Any:
        y = self.dropout(self.up(x).tanh())
        for factor in scale or ():
            y = y * factor
        if shift is not None:
            y = y + shift["by"]
        y = y if y.shape != x.shape else x + 0.3 * y
        return {"tensor": y, "pair": (y, y.sum()), "single": (y,), "none": (y, None), "dict": {"y": y}}[self.kind]


class Net(nn.Module):
    """Loops over its layers as `how` says."""

    def __init__(self, layers: Any, how: str = "plain") -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)
        self.how = how

    def forward(self, x: Tensor, scale: Any = None, *, shift: Any = None, **_: Any) -> Any:
        layers = {"cut": self.layers[:4], "skip": [*self.layers[:2], *self.layers[3:]], "late": self.layers[2:]}
        for index, layer in enumerate(layers.get(self.how, self.layers)):
            if self.how == "changed" and index == 3:
                x = 2 * x
            if self.how == "own arguments" and index == 3:
                shift = {"by": torch.ones(6, dtype=x.dtype)}
            if self.how == "keywords":
                x = layer(x=x, scale=scale, shift=shift)
            else:
                x = layer(x, scale, shift=shift)
            x = x[0] if isinstance(x, tuple) else x
        return x


def net(how: str = "plain", kind: str = "tensor") -> Net:
    return Net([Layer(kind=kind) for _ in range(DEPTH)], how).double()


def side_inputs() -> dict[str, Any]:
    scale = [torch.rand(6, dtype=torch.float64, requires_grad=True), torch.tensor(0.9, dtype=torch.float64)]
    return {"scale": scale, "shift": {"by": torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True)}}


def values(model: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """Output and the gradients of parameters, of x and of tensors in the arguments."""
    leaves = [part for part in pytree.tree_leaves(kwargs) if isinstance(part, Tensor)]
    leaves = [x, *[part for part in leaves if part.requires_grad]]
    y = model(x, **kwargs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [*model.parameters(), *leaves]
    return [y, *torch.autograd.grad((y * weights).sum(), wanted, materialize_grads=True)]


@pytest.mark.parametrize("how", ["plain", "keywords"])
@pytest.mark.parametrize("kind", ["tensor", "pair", "single", "none"])
@pytest.mark.parametrize("name", EXECUTORS)
def test_values_and_gradients_are_those_of_the_loop(name: str, kind: str, how: str) -> None:
    model, kwargs = net(how, kind).eval(), side_inputs()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    wanted = values(model, x, **kwargs)
    assert_close(values(paradepth.parallelize(model, "layers", executor=EXECUTORS[name]()), x, **kwargs), wanted)


@pytest.mark.parametrize("name", EXECUTORS)
def test_executors_draw_the_same_dropout(name: str) -> None:
    model, kwargs = paradepth.parallelize(net(), "layers"), side_inputs()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    wanted = values(model, x, **kwargs)
    after = torch.rand(2)
    model.layers.executor = EXECUTORS[name]()
    torch.manual_seed(5)
    assert_close(values(model, x, **kwargs), wanted)
    assert torch.equal(torch.rand(2), after), "the global stream goes on alike"
    assert not torch.allclose(values(model, x, **kwargs)[0], wanted[0]), "the next pass has masks of its own"


def test_masks_differ_between_layers_and_are_dropout() -> None:
    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(nn.functional.dropout(torch.ones(500), 0.25, self.training))
            return x + 0 * x

    seen: list[Tensor] = []

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Drop() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    paradepth.parallelize(Drops(), "layers")(torch.zeros(1))
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert all(0.15 < float((mask == 0).float().mean()) < 0.35 for mask in seen)


def test_evaluation_mode_leaves_the_global_random_stream_alone() -> None:
    model = paradepth.parallelize(net().eval(), "layers")
    state = torch.get_rng_state()
    model(torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_module_looks_the_same_and_is_restored() -> None:
    model = net()
    original, keys, text = model.layers, list(model.state_dict()), repr(model)
    names = [name for name, _ in model.named_modules()]
    assert paradepth.parallelize(model, "layers", executor=Picard()) is model
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert repr(model).replace("ParallelLayers", "ModuleList") == text
    assert len(model.layers) == DEPTH
    assert model.layers[-1].up.weight is original[DEPTH - 1].up.weight
    model.layers[0].kind = "none"
    assert original[0].kind == "none"
    assert type(copy.deepcopy(model.layers[1])) is Layer
    paradepth.parallelize(model, "layers", executor=MGRIT(coarsening=2))  # again: another executor
    assert isinstance(model.layers.executor, MGRIT)
    model.eval()
    assert restore(model, "layers") is model
    assert model.layers is original
    assert not original.training
    assert list(model.state_dict()) == keys
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0
    with pytest.raises(ValueError, match="not parallelized"):
        restore(model, "layers")


def test_copies_and_pickles_are_independent() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    model = paradepth.parallelize(net().eval(), "layers", executor=MGRIT(coarsening=2, forward_iterations=3))
    wanted = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), wanted)
        with torch.no_grad():
            other.layers[2].up.weight.zero_()
        assert not torch.allclose(other(x), wanted)
        assert torch.equal(model(x), wanted)
        assert len(restore(other, "layers")._forward_hooks) == 0
        assert len(model._forward_hooks) == 1


def test_layers_that_are_replaced_and_weights_that_are_loaded_take_part() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    model, other = net().eval(), net().eval()
    paradepth.parallelize(model, "layers")
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    model.layers[1] = other.layers[1] = Layer().double().eval()
    assert torch.equal(model(x), other(x))
    assert torch.equal(restore(model, "layers")(x), other(x))


def test_a_layer_used_several_times_and_frozen_layers() -> None:
    shared, frozen = Layer(), Layer().requires_grad_(False)
    model = Net([shared, frozen, shared, Layer(), shared, frozen]).double().eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad for p in model.parameters()]

    wanted = gradients()
    paradepth.parallelize(model, "layers", executor=EXECUTORS["mgrit-F"]())
    for a, b in zip(gradients(), wanted, strict=True):
        assert a is b is None or (a is not None and b is not None and torch.allclose(a, b, atol=1e-12))


def test_torch_encoders_and_decoders() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options: dict[str, Any] = {"dim_feedforward": 16, "dropout": 0.1, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **options), DEPTH, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, **options), DEPTH)
    cases: list[tuple[nn.Module, dict[str, Any]]] = [
        (encoder, {"src_key_padding_mask": padding}),
        (decoder, {"memory": memory}),
    ]
    for module, kwargs in cases:
        model = module.double().eval()
        wanted = values(model, x, **kwargs)
        for name in ("serial", "mgrit-F", "picard"):
            paradepth.parallelize(model, "layers", executor=EXECUTORS[name]())
            assert_close(values(model, x, **kwargs), wanted)


@pytest.mark.parametrize("enabled", [torch.no_grad, torch.inference_mode])
def test_inference_and_autocast(enabled: Any) -> None:
    model, x = net().float().eval(), torch.randn(2, 3, 6)
    with enabled():
        wanted = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(x)
    for name in ("serial", "mgrit-F", "picard"):
        paradepth.parallelize(model, "layers", executor=EXECUTORS[name]())
        with enabled():
            assert_close([model(x)], [wanted], 1e-5)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert_close([model(x)], [low], 1e-5)
    assert not torch.allclose(low, wanted, atol=1e-5)


@pytest.mark.gpu
def test_dropout_on_an_accelerator() -> None:
    model = paradepth.parallelize(net().cuda(), "layers")
    x = torch.randn(2, 3, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    results = []
    for make in EXECUTORS.values():
        model.layers.executor = make()
        torch.manual_seed(5)
        results.append([*values(model, x), torch.rand(3, device="cuda")])
    for result in results[1:]:
        assert_close(result, results[0])
    assert not torch.allclose(values(model, x)[0], results[0][0])


def test_paths_that_do_not_fit_are_refused() -> None:
    model = nn.Module()
    model.encoder = net()
    model.empty = nn.ModuleList()
    with pytest.raises(
        ValueError, match=r"no 'decoder.layers': the Module contains 'encoder', 'empty'.*'encoder.layers'"
    ):
        paradepth.parallelize(model, "decoder.layers")
    with pytest.raises(ValueError, match="'encoder' contains 'layers', not 'layer'"):
        paradepth.parallelize(model, "encoder.layer")
    with pytest.raises(ValueError, match="there is no ''"):
        paradepth.parallelize(model, "")
    with pytest.raises(ValueError, match=r"'encoder' is a Net; it must be an nn.ModuleList"):
        paradepth.parallelize(model, "encoder")
    with pytest.raises(ValueError, match="'empty' is empty"):
        paradepth.parallelize(model, "empty")


def test_executors_that_do_not_fit_are_refused_before_anything_changes() -> None:
    model = net()
    with pytest.raises(ValueError, match="nothing to coarsen"):
        paradepth.parallelize(model, "layers", executor=MGRIT(coarsening=8))
    with pytest.raises(ValueError, match="must be a DepthExecutor"):
        paradepth.parallelize(model, "layers", executor="mgrit")  # pyright: ignore[reportArgumentType]
    assert type(model.layers) is nn.ModuleList
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("cut", "first 4 of 6 layers only"),
        ("skip", "layer 3 is called after layer 1"),
        ("late", "layer 2 is called on its own"),
        ("changed", "layer 3 is not called with what layer 2 returned"),
        ("own arguments", "layer 3 gets another value of shift"),
    ],
)
def test_loops_that_are_not_a_plain_chain_are_refused(how: str, match: str) -> None:
    model = paradepth.parallelize(net(how), "layers")
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=match):
        model(x)
    model.how = "plain"
    assert model(x).shape == x.shape


@pytest.mark.parametrize("name", ["serial", "mgrit-F", "picard"])
def test_layers_that_return_something_else_are_refused(name: str) -> None:
    x = torch.randn(2, 3, 6)
    model = Net([Layer() for _ in range(5)] + [Layer(out=1)])
    with pytest.raises(ValueError, match=r"layer 5 \(Layer\) maps a hidden state of shape \(2, 3, 6\) to \(2, 3, 1\)"):
        paradepth.parallelize(model, "layers", executor=EXECUTORS[name]())(x)
    model = Net([Layer(kind="dict") for _ in range(6)])
    with pytest.raises(ValueError, match=r"layer \d \(Layer\) returns a dict"):
        paradepth.parallelize(model, "layers", executor=EXECUTORS[name]())(x)
    with pytest.raises(ValueError, match=r"called with a tensor of torch.int64 as its first argument"):
        model(torch.zeros(2, 3, 6, dtype=torch.int64))


def test_layers_that_change_their_input_in_place_are_refused() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
            return x.mul_(0.5)

    model = paradepth.parallelize(Net([InPlace() for _ in range(6)]), "layers", executor=EXECUTORS["picard"]())
    with torch.no_grad(), pytest.raises(ValueError, match=r"layer 0 \(InPlace\) changes the hidden state it is given"):
        model(torch.ones(2))


def test_what_a_layer_returns_besides_cannot_be_used_by_the_next() -> None:
    class Hands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(kind="pair") for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            shift: Any = None
            for layer in self.layers:
                x, total = layer(x, shift=shift)
                shift = {"by": total}
            return x

    with pytest.raises(ValueError, match="another value of shift"):
        paradepth.parallelize(Hands(), "layers")(torch.randn(2, 6))
