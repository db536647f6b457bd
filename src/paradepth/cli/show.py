"""Results for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any]) -> None:
    """Prints a result for people."""
    console = Console(soft_wrap=True, highlight=False)
    for key, value in result.items():
        if isinstance(value, dict) and value and not any(isinstance(v, list | dict) for v in value.values()):
            table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
            for name, about in value.items():
                table.add_row(str(name), str(about))
            console.print(table)
        elif key == "accuracy" and isinstance(value, list):
            console.print("accuracy by prefix: " + "  ".join(f"{100 * a:.2f} %" for a in value))
        elif key == "predictions":
            for item in value:
                if "tags" in item:
                    pairs = zip(item["words"], item["tags"], strict=True)
                    console.print(" ".join(f"{word}/{tag}" for word, tag in pairs), markup=False)
                    continue
                if "masks" in item:
                    for place in item["masks"]:
                        guesses = ", ".join(f"{g['token']!r} {100 * g['confidence']:.1f} %" for g in place)
                        console.print(f"{item['text']}: {guesses}", markup=False)
                    continue
                best = ", ".join(f"{c['class']} {100 * c['confidence']:.1f} %" for c in item["classes"])
                said = item.get("image", item.get("text"))
                console.print(f"{' | '.join(said) if isinstance(said, list) else said}: {best}", markup=False)
        elif key == "examples":
            for item in value:
                console.print("\n" + "\n".join(f"{name}: {text}" for name, text in item.items()), markup=False)
        elif isinstance(value, list) and value and all(isinstance(v, float) for v in value):
            console.print(f"{key} by prefix: " + "  ".join(f"{v:.4g}" for v in value), markup=False)
        elif isinstance(value, list) and all(isinstance(v, str) for v in value):
            console.print("\n".join(value), markup=False)
        else:
            shown = f"{value:,.4g}" if isinstance(value, float) else value
            console.print(f"{key}: {shown}", markup=False)
