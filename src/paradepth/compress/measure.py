"""What a model costs: parameters, bytes on disk, operations, latency.

Operations count the shapes that are computed with. A weight that was pruned to zero is multiplied like any other by the
kernels that run here, so zeros count; a product of integers counts like one of floating-point numbers. Neither pruning
single weights nor quantisation therefore changes them, and only the latency says what they do to time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paradepth.export.inputs import InputSpec, input_specs
from paradepth.export.latency import measure, summary, surroundings
from paradepth.models import TrunkModel
from paradepth.models.quantised import is_quantised

BATCHES = (1, 64)
_SECONDS_EACH = 0.5  # for each model and batch size, once it has had its first calls


@dataclass(frozen=True)
class Weight:
    """What a model weighs.

    Attributes:
        parameters: numbers that training determined, whatever they are stored as.
        nonzero: those that are not zero.
        bytes: of model.safetensors; config.json adds some kB to any model.
        flops: of one forward pass over one full sample, zeros and integers counted.
    """

    parameters: int
    nonzero: int
    bytes: int
    flops: int


def weigh(model: TrunkModel, *, saved: Path | None = None) -> Weight:
    """What a model weighs.

    Args:
        model: any model.
        saved: a folder that it was saved into; None saves it into a temporary one, packed: without zeros where that is
            smaller.

    >>> import paradepth
    >>> model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=4, branches=2, depth=1)
    >>> whole, half = weigh(model), weigh(model.truncate(1))
    >>> half.parameters < whole.parameters, half.bytes < 4 * half.parameters + 10_000, half.flops < whole.flops
    (True, True, True)
    """
    parameters = nonzero = 0
    for weight in model.parameters():
        parameters += weight.numel()
        nonzero += int(torch.count_nonzero(_plain(weight.detach())))
    if saved is None:
        with tempfile.TemporaryDirectory() as folder:
            size = _file_size(model.save_pretrained(folder, packed=True))
    else:
        size = _file_size(saved)
    return Weight(parameters, nonzero, size, model.forward_flops())


def _plain(weight: Tensor) -> Tensor:
    """The weight as an ordinary tensor, whatever its storage."""
    return weight.dequantize() if is_quantised(weight) else weight


def _file_size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@torch.inference_mode()
def latencies(
    models: Mapping[str, TrunkModel], *, threads: int | None = None, seconds: float | None = None
) -> dict[str, list[dict[str, Any]]]:
    """How long a forward pass takes: PyTorch, uncompiled, branches one after another, samples of full length.

    The models take turns, round by round, so that whatever else the machine does hits all of them alike.

    Args:
        models: by name, all on the same device.
        threads: CPU threads; None is PyTorch's present number.
        seconds: about how long all of it takes; None: half a second for each model and batch size. Three rounds are the
            least.

    Returns:
        For each model a row for each batch size of `BATCHES`: "batch", "median_ms", "low_ms" and "high_ms" (quartiles),
        "runs".

    Raises:
        ValueError: threads below 1, or a kind of model whose inputs are not known.

    >>> import paradepth
    >>> model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=4, branches=2, depth=1).eval()
    >>> found = latencies({"whole": model, "half": model.truncate(1)}, seconds=0.1)
    >>> list(found), [row["batch"] for row in found["half"]]
    (['whole', 'half'], [1, 64])
    """
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    each = _SECONDS_EACH * len(models) if seconds is None else seconds / len(BATCHES)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    torch.set_num_threads(before if threads is None else threads)
    try:
        for batch in BATCHES:
            runs = {name: partial(_run, model, _sample(model, batch)) for name, model in models.items()}
            for name, times in measure(_waited_for(runs, models.values()), seconds=each).items():
                found[name].append({"batch": batch, **summary(times)})
    finally:
        torch.set_num_threads(before)
    return found


def machine(device: torch.device, threads: int | None) -> dict[str, Any]:
    """What a reader of latencies has to know: device, processors, threads, and how busy the machine was."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, **surroundings(threads)}


def _run(model: TrunkModel, inputs: Any) -> Tensor:
    return model(inputs)


def _sample(model: TrunkModel, batch: int) -> Any:
    """Random inputs of full length: a tensor, or a tuple of tensors."""
    specs: tuple[InputSpec, ...] = input_specs(model.model_type, model.config)
    generator = torch.Generator().manual_seed(0)
    inputs = [spec.sample(batch, spec.longest or 1, generator).to(model.device) for spec in specs]
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def _waited_for(
    runs: Mapping[str, Callable[[], Tensor]], models: Iterable[TrunkModel]
) -> dict[str, Callable[[], object]]:
    """The same functions, which return when the device has done its work."""
    device = next(iter(models)).device
    if device.type != "cuda":
        return dict(runs)
    return {name: partial(_synchronised, run, device) for name, run in runs.items()}


def _synchronised(run: Callable[[], Tensor], device: torch.device) -> None:
    run()
    torch.cuda.synchronize(device)
