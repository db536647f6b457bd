"""Text to the token that follows.

Shapes: B batch, T tokens (the context), N windows of a split.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from paradepth.data.text import TextData
from paradepth.data.text_batches import ordered_windows
from paradepth.data.tokenizer import ByteTokenizer
from paradepth.models import CausalLM, generate
from paradepth.train.config import Config
from paradepth.train.tasks.windows import WindowTask

_EVALUATED_TOKENS = 2**15  # at a time: their logits of every prefix are in memory together
_PROMPT, _CONTINUATION = 32, 100  # tokens of an example


class LanguageTask(WindowTask):
    """Predicts every next token: a sample is a window of `context` tokens, with as many targets.

    Raises:
        ValueError: also for a text that is shorter than its windows.
    """

    model_class = CausalLM
    tokenizer = "bytes"

    def __init__(self, config: Config, data: TextData) -> None:
        super().__init__(config, data)
        self.window: int = self.shape.context
        noun = "bytes" if isinstance(data.tokenizer, ByteTokenizer) else "tokens"
        self.unit = f"windows of {self.window} {noun}"
        self.evaluation_batch = max(1, _EVALUATED_TOKENS // self.window)
        self.check_lengths(noun=noun)

    def data_shape(self) -> dict[str, Any]:
        return {"vocab_size": self.data.vocab_size}

    def ordered(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        inputs_NT, targets_NT = ordered_windows(self.tokens(split), self.window)
        inputs_BT, targets_BT = (part[start:stop].long().to(self.data.device) for part in (inputs_NT, targets_NT))
        return inputs_BT, targets_BT

    def measures(self, loss: list[float], split: str) -> dict[str, list[float]]:
        """Perplexity e^loss, of a token, and bits per byte, loss / ln 2 over the bytes that a token stands for."""
        bits_per_nat = 1 / (math.log(2) * self.data.bytes_per_token(split))
        return {
            "perplexity": self.perplexity(loss),
            "bits_per_byte": [value * bits_per_nat for value in loss],
        }

    def details(self, model: CausalLM, split: str) -> dict[str, Any]:
        """Means by prefix, and how the model continues the beginnings of two windows."""
        return {**super().details(model, split), "examples": self._continuations(model, split)}

    def _continuations(self, model: CausalLM, split: str) -> list[dict[str, str]]:
        tokenizer, tokens = self.data.tokenizer, self.tokens(split)
        length = max(1, min(self.window // 2, _PROMPT))
        starts = dict.fromkeys((0, self.count(split) // 2 * self.window))
        prompts = [tokenizer.decode(tokens[start : start + length].tolist()) for start in starts]
        # Half a character, or a tokeniser that loses something, may make the text longer than it was.
        prompts = [prompt for prompt in prompts if 1 <= len(tokenizer.encode(prompt)) <= self.window]
        examples = [{"prompt": prompt} for prompt in prompts]
        for k in dict.fromkeys((1, model.prefixes)) if prompts else ():
            name = "continuation" if model.prefixes == 1 else f"{k} branch{'es' * (k > 1)}"
            made = generate(
                model,
                tokenizer,
                prompts,
                max_tokens=_CONTINUATION,
                temperature=0.8,
                seed=self.config.run_options.seed,
                branches=k,
            )
            for example, one in zip(examples, made, strict=True):
                example[name] = one.text
        return examples
