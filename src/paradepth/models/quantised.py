"""Quantised models: weights as small integers with scales, and how they lie in model.safetensors without pickle.

    linear maps of trunk and head   integers and scales in torchao's tensors, which do the products
    tables of embeddings            rounded to 8 bits, the scale of a row a power of two   ⎫ stored small,
    all other weights               rounded to half precision                              ⎭ computed in float32
    buffers                         as they are

What is rounded is rounded once, when a model is quantised. Saving loses nothing after that: a number is stored in the
smallest form that gives it back.

torchao is an optional dependency, imported when a model is quantised or a quantised one is loaded.

Shapes: N outputs of a linear map, or rows of a table; K inputs, or width; G groups of inputs, each with a scale.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from paradepth.models.sharing import check_unshared

Method = Literal["int8", "int8_dynamic", "int4"]
GROUP = 32  # inputs that share a scale, of 4-bit integers
_LARGEST = 127  # of a table's integers


@dataclass(frozen=True)
class Quantisation:
    """How a model is quantised; `config.json` holds it under "quantisation".

    Attributes:
        method: "int8": integers of 8 bits and a scale for each output; what they are multiplied with stays float32.
            "int8_dynamic": also the inputs of a linear map become integers of 8 bits, with a scale for each token that
            is found as it comes. "int4": integers of 4 bits and a scale for every `group` inputs of an output, or for
            all of its inputs where these are no multiple of the group.
        reduce_range: of int8_dynamic: 7 bits instead of 8, since the processor's sums of products would overflow
            (x86 without VNNI).
        group: of int4: inputs that share a scale.

    Raises:
        ValueError: an unknown method, or settings out of range or of another method.
    """

    method: Method
    reduce_range: bool | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"quantisation is {self.method!r}; it must be one of {', '.join(get_args(Method))}")
        dynamic, four = self.method == "int8_dynamic", self.method == "int4"
        if not (isinstance(self.reduce_range, bool) if dynamic else self.reduce_range is None):
            raise ValueError(f"reduce_range is {self.reduce_range!r}; it is true or false, of int8_dynamic alone")
        if not (type(self.group) is int and self.group > 0 if four else self.group is None):
            raise ValueError(f"group is {self.group!r}; it is a number of inputs, at least 1, of int4 alone")

    @classmethod
    def here(cls, method: str) -> Quantisation:
        """A method with the settings that suit this machine.

        Raises:
            ValueError: an unknown method, or torchao is not installed.
        """
        from_name: Any = method
        if method == "int8_dynamic":
            return cls(from_name, reduce_range=_must_reduce_range())
        return cls(from_name, group=GROUP if method == "int4" else None)

    @classmethod
    def read(cls, entry: Any) -> Quantisation:
        """The inverse of `entry`.

        Raises:
            ValueError: something else.
        """
        if not isinstance(entry, dict) or not {"method"} <= set(entry) <= {"method", "reduce_range", "group"}:
            raise ValueError(f"quantisation is {entry!r}, which this version of paradepth does not know")
        return cls(**entry)

    def entry(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def quantise(model: Any, method: Method) -> Any:
    """A quantised copy of a model, for use and not for training: in evaluation mode, its parameters need no gradients.

    The linear maps of trunk and head compute with integers. The stem computes in float32 as before, its tables of
    embeddings rounded to 8 bits and its other weights (the map of patches, positions) to half precision; so are biases
    and norms everywhere. A head that shares the stem's table computes with that, in float32.

    What is gained is the file, which becomes a quarter ("int4": a sixth). With layers as narrow as those of small
    models, torchao's products take longer than those of float32.

    Args:
        model: a model in float32; it is left alone.
        method: "int8", "int8_dynamic" or "int4", see `Quantisation`.

    Raises:
        ValueError: an unknown method, a model that cannot be quantised (`check_quantise`), or torchao is not installed.

    >>> import paradepth
    >>> model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=4, branches=2, depth=1).eval()
    >>> images = torch.rand(2, 3, 8, 8)
    >>> small = quantise(model, "int8")
    >>> bool(torch.allclose(small(images), model(images), atol=0.05)), type(small.head.classify.weight).__name__
    (True, 'Int8Tensor')
    """
    how = Quantisation.here(method)
    check_quantise(model)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} has numbers that are infinite or not a number; such a model is not quantised")
    new = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        rounded_in_integers = {f"{name}.weight" for name in _linears(new)}
        tables = _tables(new)
        for name, parameter in new.named_parameters():
            if name in tables:
                parameter.copy_(_table_values(*_table(parameter)))
            elif name not in rounded_in_integers:
                half = parameter.half()
                parameter.copy_(torch.where(half.isfinite(), half, parameter))
        _to_integers_(new, how)
    new.quantisation = how
    return new


def check_quantise(model: Any) -> None:
    """Refuses a model that cannot be quantised, before any work; it may be one without weights, on the meta device.

    Raises:
        ValueError: it is quantised already, not in float32, shared between processes, has layers that share weights,
            or torchao is not installed.
    """
    if model.quantisation is not None:
        raise ValueError(f"the model is quantised already ({model.quantisation.method}); quantise the one before")
    model.check_whole()
    check_unshared(model.config, "quantising gives every layer integers of its own")
    others = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if others:
        raise ValueError(f"the model has weights in {others.pop()}; models are quantised from torch.float32")
    _torchao()


def check_learns(quantisation: Quantisation | dict[str, Any] | None, what: str) -> None:
    """Refuses to train a quantised model.

    Args:
        quantisation: of the model, or the entry of a `config.json`; None where there is none.
        what: the model is, for the message.

    Raises:
        ValueError: it is quantised, and what to do.
    """
    if quantisation:
        method = quantisation.get("method") if isinstance(quantisation, dict) else quantisation.method
        raise ValueError(
            f"{what} is quantised ({method}), and rounded weights do not learn; take the run in float32 that it was "
            "made from"
        )


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor holds integers and scales rather than plain numbers."""
    return type(tensor).__module__.startswith("torchao.")


def float_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model as plain tensors, by name; of a quantised one what its integers stand for.

    Raises:
        ValueError: the model rounds the inputs of its linear maps, so no plain weights compute what it computes.
    """
    if model.quantisation is not None and model.quantisation.method == "int8_dynamic":
        raise ValueError(
            "the model is quantised by int8_dynamic: it rounds what goes into its linear maps, which no weights in "
            "float32 do; take one quantised by int8, or the run in float32 that it was made from"
        )
    return {name: t.dequantize() if is_quantised(t) else t for name, t in model.state_dict().items()}


# ---- storage -------------------------------------------------------------------------------------------------


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """What model.safetensors holds of a quantised model: plain tensors, from which `load_quantised` makes the same.

    A weight of integers NAME is stored as "NAME.int8" (N, K), or "NAME.int4" (N, K/2 rounded up) with two integers in
    each byte, the first one in the lower half; and its scales as "NAME.scale" (N, G). A table is stored as "NAME.int8"
    (N, K) and "NAME.scale" (N, 1). Everything else has its own name, in half precision where that is the same number.
    """
    tables = _tables(model)
    stored: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if is_quantised(tensor):
            four = model.quantisation.method == "int4"
            stored[f"{name}.int4" if four else f"{name}.int8"] = _pairs(tensor.qdata) if four else tensor.qdata
            stored[f"{name}.scale"] = tensor.scale
        elif name in tables:
            integers, scale_N1 = _table(tensor)
            stored[f"{name}.int8"], stored[f"{name}.scale"] = integers, scale_N1.bfloat16()
        elif tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor):
            stored[name] = tensor.half()
        else:
            stored[name] = tensor
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def load_quantised(model: Any, stored: dict[str, Tensor], entry: Any) -> None:
    """Gives a new model the weights that `stored_tensors` wrote.

    Args:
        model: in float32, of the right configuration; changed in place.
        stored: the content of model.safetensors.
        entry: of config.json, under "quantisation".

    Raises:
        ValueError: an unknown entry, tensors that are missing, of another shape or type, or that the model does not
            have, a processor that cannot compute with them, or torchao is not installed.
    """
    how = Quantisation.read(entry)
    if how.reduce_range is False and _must_reduce_range():
        raise ValueError(
            "the model was quantised by int8_dynamic with 8 bits, and on this processor (without VNNI) its sums would "
            "overflow; quantise the model in float32 again here, or use int8"
        )
    _to_integers_(model, how)  # of fresh weights: tensors of the right form, to be filled
    tables, left = _tables(model), _Left(stored)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            N, *rest = tensor.shape or (1,)
            if is_quantised(tensor) and how.method == "int4":
                pairs = left.take(f"{name}.int4", (N, -(-rest[0] // 2)), torch.uint8)
                tensor.qdata.copy_(_apart(pairs, rest[0]))
                tensor.scale.copy_(left.take(f"{name}.scale", tensor.scale.shape, tensor.scale.dtype))
            elif is_quantised(tensor):
                tensor.qdata.copy_(left.take(f"{name}.int8", tensor.shape, torch.int8))
                tensor.scale.copy_(left.take(f"{name}.scale", tensor.scale.shape, tensor.scale.dtype))
            elif name in tables:
                integers = left.take(f"{name}.int8", tensor.shape, torch.int8)
                tensor.copy_(_table_values(integers, left.take(f"{name}.scale", (N, 1), torch.bfloat16).float()))
            else:
                smaller = (torch.float16,) if tensor.dtype == torch.float32 else ()
                tensor.copy_(left.take(name, tensor.shape, tensor.dtype, *smaller))
    left.check_empty()
    model.requires_grad_(False)
    model.quantisation = how


class _Left:
    """Tensors of a file that nobody has asked for yet."""

    def __init__(self, stored: dict[str, Tensor]) -> None:
        self._stored = dict(stored)

    def take(self, name: str, shape: Iterable[int], *dtypes: torch.dtype) -> Tensor:
        """A tensor of the file, of this shape and one of these types."""
        if name not in self._stored:
            raise ValueError(f"there is no {name}, which a model quantised in this way has")
        tensor, shape = self._stored.pop(name), tuple(shape)
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; the model needs "
                f"{' or '.join(map(str, dtypes))} of shape {shape}"
            )
        return tensor

    def check_empty(self) -> None:
        """Refuses a file with more than the model has."""
        if self._stored:
            raise ValueError(f"there is {min(self._stored)}, which the model does not have")


# ---- integers ------------------------------------------------------------------------------------------------


def _torchao() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells of kernels for other devices that do not load on this one
    try:
        import torchao.quantization as quantization
    except ImportError as error:
        raise ValueError(
            "quantised models need the package torchao, which cannot be imported here "
            f"({error}): pip install 'paradepth[quantize]'"
        ) from error
    finally:
        logging.disable(before)
    return quantization


def _must_reduce_range() -> bool:
    _torchao()
    from torchao.utils import should_reduce_range

    return bool(should_reduce_range(torch.device("cpu")))


def _linears(model: Any) -> dict[str, nn.Linear]:
    """The linear maps of trunk and head, by name; but those of a single input, which torchao does not take."""
    inside = {*model.trunk.modules(), *model.head.modules()}
    found = ((name, module) for name, module in model.named_modules() if module in inside)
    return {name: module for name, module in found if isinstance(module, nn.Linear) and module.in_features > 1}


def _to_integers_(model: Any, how: Quantisation) -> None:
    """Replaces the weights of the linear maps by torchao's tensors."""
    ao = _torchao()
    linears = set(_linears(model).values())
    if how.method == "int4":
        assert how.group is not None
        four_bits = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
        options = {"weight_dtype": four_bits, "scale_dtype": torch.bfloat16}
        grouped = {linear for linear in linears if linear.in_features % how.group == 0}
        kinds = [
            (ao.IntxWeightOnlyConfig(granularity=ao.PerGroup(how.group), **options), grouped),
            (ao.IntxWeightOnlyConfig(granularity=ao.PerAxis(0), **options), linears - grouped),
        ]
    elif how.method == "int8":
        kinds = [(ao.Int8WeightOnlyConfig(set_inductor_config=False), linears)]
    else:
        config = ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=how.reduce_range)
        kinds = [(config, linears)]
    for config, chosen in kinds:
        ao.quantize_(model, config, filter_fn=lambda module, name, chosen=chosen: module in chosen)


def _pairs(integers_NK: Tensor) -> Tensor:
    """Integers from −8 to 7 as the halves of bytes, (N, K/2 rounded up).

    >>> _pairs(torch.tensor([[-8, 7, 0]], dtype=torch.int8)).tolist()
    [[240, 136]]
    """
    raised_NK = nn.functional.pad((integers_NK + 8).to(torch.uint8), (0, integers_NK.shape[1] % 2), value=8)
    return raised_NK[:, ::2] | raised_NK[:, 1::2] << 4


def _apart(pairs: Tensor, width: int) -> Tensor:
    """The inverse of `_pairs`, (N, K) for a width K.

    >>> _apart(torch.tensor([[240, 136]], dtype=torch.uint8), 3).tolist()
    [[-8, 7, 0]]
    """
    return (torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)[:, :width].to(torch.int16) - 8).to(torch.int8)


# ---- tables of embeddings ------------------------------------------------------------------------------------


def _tables(model: Any) -> set[str]:
    """Names of the weights that rows are looked up in."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _table(values_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of 8 bits (N, K), and the scale of each row (N, 1).

    A scale is the least power of two with which the row's integers stay within ±127. So it follows from the rounded
    row as from the row itself, and rounding twice is rounding once.

    >>> integers, scale = _table(torch.tensor([[1.0, -0.3], [0.0, 0.0]]))
    >>> integers.tolist(), scale.tolist()
    ([[64, -19], [0, 0]], [[0.015625], [1.0]])
    """
    most_N1 = values_NK.double().abs().amax(dim=1, keepdim=True)
    exponent_N1 = (most_N1 / _LARGEST).log2().ceil().clamp(min=-126)
    scale_N1 = torch.where(most_N1 > 0, exponent_N1.exp2(), 1.0)
    return (values_NK.double() / scale_N1).round().to(torch.int8), scale_N1.float()


def _table_values(integers_NK: Tensor, scale_N1: Tensor) -> Tensor:
    """The numbers that the integers stand for, float32."""
    return integers_NK.float() * scale_N1
