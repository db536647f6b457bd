"""Using an exported ONNX file in onnxruntime as the model that it was made from.

Shapes: B batch, n prefixes, … the shape of one sample's logits, P places.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paradepth.export.describe import KEY, read_description
from paradepth.export.inputs import input_specs
from paradepth.export.session import Execution, open_session
from paradepth.models.pretrained import read_config

if TYPE_CHECKING:  # importing the package of data needs Pillow
    from paradepth.data.tokenizer import Tokenizer
    from paradepth.data.words import WordVocabulary


class OnnxModel:
    """A model whose forward pass is an ONNX file; called as the model that it was made from: tensors in, logits out.

    What classifies images and texts, tags words and fills in masks takes it as it takes that model.

    Args:
        source: a file, or its content.
        threads: threads in all; None leaves it to onnxruntime.
        execution: "sequential", or "parallel", which evaluates branches side by side.

    Attributes:
        description: what the file says of itself.
        model_type, config: of the model that it was made from; with as many branches as are in the file.
        device: the CPU.

    Raises:
        ValueError: no such file, no ONNX file, one that paradepth did not export, options out of range, or onnxruntime
            is not installed.
    """

    device = torch.device("cpu")

    def __init__(
        self, source: str | Path | bytes, *, threads: int | None = None, execution: Execution = "sequential"
    ) -> None:
        where = "the content" if isinstance(source, bytes) else str(source)
        session = open_session(source, threads=threads)
        self._metadata: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)
        self.description = read_description(self._metadata.get(KEY), where=where)
        try:
            self.model_type: str = self.description["model_type"]
            self.config: Any = read_config(self.description)
            self._inputs = input_specs(self.model_type, self.config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: its description is damaged: {error}") from error
        if execution != "sequential":
            branches = self.config.branches
            session = open_session(source, threads=threads, execution=execution, branches=branches)
        self._session = session
        self._outputs: list[str] = list(self.description["outputs"])

    @property
    def prefixes(self) -> int:
        """Number of prefix models that can be asked for."""
        return len(self._outputs)

    def __call__(self, inputs: Any, *, branches: int | None = None) -> Tensor:
        """Logits (B, …), of the prefix that uses the first `branches` branches (default: all in the file).

        Args:
            inputs: what the model takes: a tensor, or a tuple of tensors. A masked language model takes (tokens, places
                (B, P)), too, for the logits (B, P, V) at these places.
            branches: one of the prefixes of a file with prefixes (onnxruntime evaluates all branches whichever it is).
                Otherwise the number of branches that the file was made with.

        Raises:
            ValueError: inputs of another kind or shape, or a number of branches that the file has no output for.
        """
        name = self._output(branches)
        if self.model_type == "masked_lm" and isinstance(inputs, tuple):
            tokens_BT, places_BP = inputs
            (logits_BTV,) = self._run(tokens_BT, [name])
            return logits_BTV.gather(1, places_BP.unsqueeze(-1).expand(-1, -1, logits_BTV.shape[-1]))
        return self._run(inputs, [name])[0]

    def prefix_logits(self, inputs: Any) -> Tensor:
        """Logits of all prefixes in the file from one evaluation, shape (n, B, …)."""
        return torch.stack(self._run(inputs, self._outputs))

    def tokenizer(self) -> Tokenizer:
        """The tokeniser that came with the model.

        Raises:
            ValueError: it was exported without, or it is damaged.
        """
        from paradepth.data.tokenizer import read_tokenizer

        return read_tokenizer(self.asset("tokenizer.json"))

    def words(self) -> WordVocabulary:
        """A tagger's vocabulary, which came with it.

        Raises:
            ValueError: it was exported without, or it is damaged.
        """
        from paradepth.data.words import read_words

        return read_words(self.asset("words.json"))

    def asset(self, name: str) -> str:
        """The content of a file that came with the model, such as tokenizer.json.

        Raises:
            ValueError: it was exported without.
        """
        if name not in self._metadata:
            raise ValueError(
                f"this file was exported without {name}; export the run that has it, not its weights alone"
            )
        return self._metadata[name]

    def _output(self, branches: int | None) -> str:
        if branches is None:
            return self._outputs[-1]
        if self.description["prefixes"]:
            if 1 <= branches <= self.prefixes:
                return self._outputs[branches - 1]
            raise ValueError(f"branches is {branches}; this file has {self.prefixes}, and at least 1 is needed")
        held = max(self.config.branches, 1)
        if branches != held:
            raise ValueError(
                f"branches is {branches}; this file was made with {held} and gives their logits only: export with "
                "prefixes for a choice"
            )
        return self._outputs[0]

    def _run(self, inputs: Any, outputs: list[str]) -> list[Tensor]:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        if len(given) != len(self._inputs):
            raise ValueError(f"there are {len(given)} inputs; this file takes {[spec.name for spec in self._inputs]}")
        for spec, tensor in zip(self._inputs, given, strict=True):
            spec.check(tensor)
        feed = {spec.name: tensor.to(spec.dtype).numpy() for spec, tensor in zip(self._inputs, given, strict=True)}
        return [torch.from_numpy(array) for array in self._session.run(outputs, feed)]
