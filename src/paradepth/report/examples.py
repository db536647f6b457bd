"""Example predictions of an evaluation: checked, then in words for the page.

An example is told by its keys:

    png, label, prediction, confidence[, by_prefix]     an image; classes are numbers
    text, label, prediction, confidence[, by_prefix]    a text or a pair of texts; classes are numbers or names
    words, labels, prediction                           a sentence with a tag for every word
    source, reference, translation[, by_prefix]         a sentence and its translation
    anything else                                       shown as it is, a line for each key
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from paradepth.report import text

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PAIR = ("source", "reference", "translation")


# ---- checking --------------------------------------------------------------------------------------------------


def short(value: object) -> str:
    """A value for a message, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def check_examples(examples: object, names: Sequence[str], path: Path) -> None:
    """Refuses examples that do not fit together.

    Raises:
        ValueError: naming the file and the example.
    """
    if not isinstance(examples, list):
        raise ValueError(f"{path}: 'examples' is {short(examples)}, expected a list")
    for index, example in enumerate(examples):
        what = f"{path}: example {index}"
        if not isinstance(example, dict):
            raise ValueError(f"{what} is {short(example)}, expected an object")
        layout = layout_of(example)
        if layout in ("images", "texts"):
            _check_classes(example, names, what, numbers_only=layout == "images")
        if layout == "images" and not _is_png(example.get("png")):
            raise ValueError(f"{what}: 'png' is not a base64 PNG image")
        if layout == "tags":
            columns = [example["words"], example["labels"], example["prediction"]]
            if not all(isinstance(column, list) for column in columns) or len({len(c) for c in columns}) != 1:
                raise ValueError(f"{what}: 'words', 'labels' and 'prediction' are not lists of the same length")
        if layout == "translations" and not all(isinstance(example[key], str) for key in _PAIR):
            raise ValueError(f"{what}: 'source', 'reference' and 'translation' are not all text")
        if layout == "translations" and not isinstance(example.get("by_prefix") or [], list):
            raise ValueError(f"{what}: 'by_prefix' is {short(example['by_prefix'])}, expected a list of translations")


def layout_of(example: Mapping[str, Any]) -> str:
    """How an example is shown, by its keys: images, texts, tags, translations or fields.

    >>> layout_of({"text": "fine", "label": 1, "prediction": 1, "confidence": 0.9}), layout_of({"prompt": "To be"})
    ('texts', 'fields')
    """
    if "png" in example:
        return "images"
    if {"text", "label", "prediction", "confidence"} <= example.keys():
        return "texts"
    if {"words", "labels", "prediction"} <= example.keys():
        return "tags"
    return "translations" if set(_PAIR) <= example.keys() else "fields"


def _check_classes(example: Mapping[str, Any], names: Sequence[str], what: str, *, numbers_only: bool) -> None:
    by_prefix = example.get("by_prefix") or []
    found = [example.get("label"), example.get("prediction")]
    for value in [*found, *(by_prefix if isinstance(by_prefix, list) else [None])]:
        if isinstance(value, str) and not numbers_only:
            continue
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise ValueError(f"{what} has the class {short(value)}, allowed are 0 to {len(names) - 1}")
    if not _is_number(example.get("confidence")):
        raise ValueError(f"{what}: 'confidence' is {short(example.get('confidence'))}, expected a number")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_png(value: object) -> bool:
    try:
        return isinstance(value, str) and base64.b64decode(value, validate=True).startswith(_PNG_SIGNATURE)
    except binascii.Error:
        return False


# ---- showing ---------------------------------------------------------------------------------------------------


def example_groups(examples: Sequence[Mapping[str, Any]], names: Sequence[str], branches: int) -> list[dict[str, Any]]:
    """Examples in groups for the page, each with `title`, `layout` and `items`; mistakes apart from the rest."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for example in examples:
        layout = layout_of(example)
        item = _SHOWN[layout](example, names, branches)
        title = "" if "right" not in item else "Correct" if item["right"] else "Mistakes"
        groups.setdefault((layout, title), []).append(item)
    order = sorted(groups, key=lambda group: group[1] == "Correct")
    return [{"title": title, "layout": layout, "items": groups[layout, title]} for layout, title in order]


def _classified(example: Mapping[str, Any], names: Sequence[str], branches: int) -> dict[str, Any]:
    said = example.get("text", "")
    return {
        "png": example.get("png", ""),
        "texts": [str(part) for part in (said if isinstance(said, list) else [said])],
        "true": _name(example["label"], names),
        "predicted": _name(example["prediction"], names),
        "confidence": text.percent(example["confidence"], 1),
        "right": example["label"] == example["prediction"],
        "prefix": first_right(example, branches),
    }


def _tagged(example: Mapping[str, Any], names: Sequence[str], branches: int) -> dict[str, Any]:
    tags = zip(example["words"], example["labels"], example["prediction"], strict=True)
    words = [
        {"word": str(word), "true": _name(label, names), "predicted": _name(guess, names), "right": label == guess}
        for word, label, guess in tags
    ]
    return {"words": words, "right": all(word["right"] for word in words)}


def _translated(example: Mapping[str, Any], names: Sequence[str], branches: int) -> dict[str, Any]:
    by_prefix = [str(said) for said in example.get("by_prefix") or []] if branches > 1 else []
    return {key: example[key] for key in _PAIR} | {"by_prefix": by_prefix[:-1]}


def _fields(example: Mapping[str, Any], names: Sequence[str], branches: int) -> dict[str, Any]:
    return {"fields": [(key, text.setting(value)) for key, value in example.items() if value is not None]}


_SHOWN = {
    "images": _classified,
    "texts": _classified,
    "tags": _tagged,
    "translations": _translated,
    "fields": _fields,
}


def _name(label: object, names: Sequence[str]) -> str:
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else str(label)


def first_right(example: Mapping[str, Any], branches: int) -> str:
    """Which prefix first gave the true class, and whether a later one lost it; empty for a serial network.

    >>> first_right({"label": 3, "by_prefix": [1, 3, 3]}, 3)
    'right from prefix 2'
    >>> first_right({"label": 3, "by_prefix": [1, 3, 5]}, 3)
    'right at prefix 2, then lost'
    """
    hits = [prediction == example["label"] for prediction in example.get("by_prefix") or []]
    if branches < 2 or len(hits) < 2:
        return ""
    if not any(hits):
        return "no prefix right"
    first = hits.index(True) + 1
    if not hits[-1]:
        return f"right at prefix {first}, then lost"
    lost = any(before and not after for before, after in pairwise(hits))
    return f"first right at prefix {first}" if lost else f"right from prefix {first}"
