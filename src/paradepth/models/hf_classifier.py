"""Classification of texts by a pretrained encoder of the transformers library, whose layers a depth executor evaluates.

    encoder (AutoModel)   embeddings → [layers, as a Stack] → states → TextClassifierHead → logits

Weights keep the names they have there, under `encoder.`. transformers is an optional dependency.

Shapes: B batch, T tokens, N classes, D width.
"""

from __future__ import annotations

import inspect
import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.depth import DepthExecutor, ParallelLayers, Stack, parallelize
from paradepth.depth.foreign import random_numbers_of
from paradepth.models.base import TrunkModel
from paradepth.models.encoder import padding_mask
from paradepth.models.pretrained import register_model_type
from paradepth.nn import Dropout, TextClassifierHead
from paradepth.nn.heads import TextPool


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "encoders of Hugging Face need the transformers library, which is not installed: pip install paradepth[hf]"
        ) from error
    return transformers


@dataclass(frozen=True)
class HFClassifierConfig:
    """Everything that determines the shape of an `HFClassifier`.

    Attributes:
        hf: the encoder's own configuration, as the transformers library writes it.
        context: tokens of a text at most.
        pad, separator: numbers of the tokens that fill up and end texts.
        num_classes: N.
        class_names: names of the classes, empty when unknown.
        pool: what is classified: the "mean" of the tokens, the first one ("cls") or the "last".
        dropout: probability before the last linear map; the encoder has its own.

    Raises:
        ValueError: no configuration of an encoder, or more tokens than it takes.
    """

    hf: dict[str, Any] = field(default_factory=dict)
    context: int = 128
    pad: int = 0
    separator: int = 102
    num_classes: int = 2
    class_names: tuple[str, ...] = ()
    pool: TextPool = "mean"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if not isinstance(self.hf.get("model_type"), str):
            raise ValueError(
                "hf is no configuration of a transformers encoder; start from one: paradepth finetune hf:FOLDER"
            )
        most = self.hf.get("max_position_embeddings")
        if self.context < 3 or (isinstance(most, int) and self.context > most):
            raise ValueError(f"context is {self.context}; this encoder takes 3 to {most or 'any number of'} tokens")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for num_classes {self.num_classes}")

    branches = 0  # a serial stack; not a field
    step, buffers, aggregate = 1.0, (0, 0), "residual"

    def _size(self, *names: str) -> int:
        return next((int(self.hf[name]) for name in names if name in self.hf), 0)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self._size("num_hidden_layers", "n_layers", "num_layers")

    layers = depth

    @property
    def width(self) -> int:
        """D."""
        return self._size("hidden_size", "dim", "d_model")


class _Rest(nn.Module):
    """The parts of an encoder besides its layers; the stem of an `HFClassifier`."""

    def __init__(self, encoder: nn.Module, layers: nn.Module, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self._take(encoder, layers, "")

    def _take(self, module: nn.Module, layers: nn.Module, name: str) -> None:
        if module is layers:
            return
        if layers not in module.modules():
            self.add_module(name, module)
            return
        for key, parameter in module.named_parameters(recurse=False):
            self.register_parameter(f"{name}_{key}", parameter)
        for key, child in module.named_children():
            self._take(child, layers, f"{name}_{key}")

    def flops(self) -> int:
        """Floating-point operations of embedding one text: looking up multiplies nothing."""
        return 0


class _Catch(DepthExecutor):
    """Evaluates nothing, and keeps what it was to evaluate."""

    on_several_processes = True

    def __init__(self) -> None:
        self.caught: tuple[Any, tuple[Any, ...]] | None = None

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        self.caught = x, inputs
        return x


@register_model_type("hf_classifier")
class HFClassifier(TrunkModel):
    """Tokens (B, T), padded, to logits (B, N), by an encoder such as BERT, RoBERTa, DistilBERT or ELECTRA.

    Its layers are a `Stack` (`trunk`), so that executors of depth apply; its prefix is one. Dropout inside the encoder
    draws from a stream that follows from the key of the training step, so that resumed runs draw the same.

    Args:
        config: the shape; weights are fresh until `load_encoder` or `from_pretrained` brings trained ones.

    Raises:
        ValueError: transformers is not installed, does not know the encoder, or it has no list of layers.
    """

    model_type = "hf_classifier"
    config_class = HFClassifierConfig

    config: HFClassifierConfig
    head: TextClassifierHead
    _list: ParallelLayers
    _rest: _Rest
    _segments: int

    def __init__(self, config: HFClassifierConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.encoder: Any = _without_pooler(_new_encoder(config.hf))
        path = _path_of_layers(self.encoder, config.depth)
        parallelize(self.encoder, path)
        self.__dict__["_list"] = self.encoder.get_submodule(path)
        # Not registered as a module: its parameters have their names already.
        self.__dict__["_rest"] = _Rest(self.encoder, self._list, config.context)
        self.head = TextClassifierHead(config.width, config.num_classes, pool=config.pool, dropout=config.dropout)
        self.draws = Dropout(0.5)  # drops nothing: its key, a function of (seed, step), seeds the encoder's dropout
        parameters = inspect.signature(self.encoder.forward).parameters
        self.__dict__["_segments"] = int(config.hf.get("type_vocab_size", 0)) if "token_type_ids" in parameters else 0

    @property
    def trunk(self) -> Stack:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoder's layers."""
        return self._list.stack

    @property
    def stem(self) -> _Rest:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the encoder has besides its layers: embeddings, and what follows the last layer."""
        return self._rest

    def states(self, tokens_BT: Tensor) -> Tensor:
        """The encoder's last states (B, T, D)."""
        c = self.config
        if tokens_BT.dim() != 2 or not 1 <= tokens_BT.shape[1] <= c.context:
            raise ValueError(
                f"tokens have shape {tuple(tokens_BT.shape)}; this model takes (batch, tokens) with 1 to {c.context} "
                "tokens, its context"
            )
        inputs = {"input_ids": tokens_BT, "attention_mask": padding_mask(tokens_BT, c.pad)[:, 0, 0].long()}
        if self._segments > 1:
            ends_BT = tokens_BT == c.separator
            inputs["token_type_ids"] = (ends_BT.cumsum(dim=1) - ends_BT.long()).clamp(max=1)
        with self._drawing(tokens_BT.device):
            return self.encoder(**inputs).last_hidden_state

    def _drawing(self, device: torch.device) -> Any:
        if not self.training:
            return nullcontext()
        high, low = (int(word) & 0xFFFFFFFF for word in self.draws.key)
        return random_numbers_of(high << 32 | low, 0, device)

    def embed(self, inputs: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The state before the first layer, and what every layer gets besides."""
        stack, catch = self.trunk, _Catch()
        before, stack.executor = stack.executor, catch
        try:
            self.states(inputs)
        finally:
            stack.executor = before
        assert catch.caught is not None
        return catch.caught

    def forward(self, inputs: Tensor, *, branches: int | None = None) -> Tensor:
        if branches not in (None, 1):
            self._branches(f"branches={branches}")
        return self.head(self.states(inputs), padding_mask(inputs, self.config.pad)[:, 0, 0])

    def contributions(self, inputs: Tensor) -> Tensor:
        return torch.zeros(0, len(inputs), device=inputs.device)

    @torch.no_grad()
    def load_encoder(self, folder: str | Path) -> None:
        """Takes the encoder's weights from a folder of the transformers library; safetensors only, no remote code.

        Raises:
            ValueError: no or other weights.
        """
        if not list(Path(folder).glob("*.safetensors")):
            raise ValueError(f"{folder} has no *.safetensors; other files of weights may run code and are not read")
        try:
            trained = _transformers().AutoModel.from_pretrained(
                str(folder), use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
            self.encoder.load_state_dict(_without_pooler(trained).float().state_dict())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder}: the weights do not fit the encoder: {error}") from error


def is_hf_folder(place: str | Path) -> bool:
    """Whether a folder holds a model of the transformers library rather than one of this package."""
    try:
        described = json.loads((Path(place) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(described, dict) and "paradepth" not in described and "model_type" in described


def hf_config(folder: str | Path) -> dict[str, Any]:
    """The encoder's configuration in a folder of the transformers library, or of a saved `HFClassifier`.

    Raises:
        ValueError: there is none, or transformers does not know it.
    """
    try:
        described = json.loads((Path(folder) / "config.json").read_text())
        if described.get("paradepth"):
            return described["model"]["hf"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} has no config.json of a transformers encoder: {error!r}") from error
    try:
        found = _transformers().AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no encoder that transformers knows: {error}") from error
    return json.loads(found.to_json_string(use_diff=True)) | {"model_type": found.model_type}


def _new_encoder(hf: dict[str, Any]) -> nn.Module:
    transformers = _transformers()
    options = {key: value for key, value in hf.items() if key not in ("model_type", "dtype", "torch_dtype")}
    # In half types on CPUs the backward pass of the fused kernel is several times slower than matrix products.
    kernel = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    try:
        return transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(hf["model_type"], **options), **kernel
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"transformers cannot build an encoder of type {hf['model_type']!r}: {error}") from error


def _without_pooler(encoder: Any) -> Any:
    if isinstance(getattr(encoder, "pooler", None), nn.Module):  # the head has its own
        encoder.pooler = None
    return encoder


def _path_of_layers(encoder: nn.Module, depth: int) -> str:
    lists = [name for name, part in encoder.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(lists) != 1:
        raise ValueError(
            f"a {type(encoder).__name__} has {len(lists)} lists of its {depth} layers; encoders with one, such as "
            "BERT, RoBERTa, DistilBERT and ELECTRA, can be taken"
        )
    return lists[0]
