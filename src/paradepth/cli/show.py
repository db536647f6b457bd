"""Results for people. Plain print: no command needs a package to say what it found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def show(result: dict[str, Any]) -> None:
    """Prints a result for people."""
    for key, value in result.items():
        if isinstance(value, dict) and value and not any(isinstance(v, list | dict) for v in value.values()):
            _table([(str(name), str(about)) for name, about in value.items()])
        elif key == "accuracy" and isinstance(value, list):
            print("accuracy by prefix: " + "  ".join(f"{100 * a:.2f} %" for a in value))
        elif key == "points" and isinstance(value, list):
            _table(_frontier(value))
        elif key in ("layers", "branches") and isinstance(value, list):
            _table(_facts(value))
        elif key == "predictions":
            for item in value:
                _prediction(item)
        elif key == "latency":
            rows = [("batch", "milliseconds", "middle half", "")]
            for row in value:
                middle = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
                rows.append((str(row["batch"]), f"{row['median_ms']:.2f}", middle, row["what"]))
            _table(rows)
        elif key == "curve":
            rows = [("accepted loss", "accuracy", "branches", "layer evaluations", "stopped after 1, 2, …")]
            for row in value:
                numbers = f"{row['tolerance']:g}", f"{100 * row['stopping_accuracy']:.2f} %"
                compute = f"{row['mean_branches']:.2f}", f"{row['layer_evals']:.2f}"
                rows.append((*numbers, *compute, " ".join(map(str, row["stopped"]))))
            _table(rows)
        elif key == "examples":
            for item in value:
                print("\n" + "\n".join(f"{name}: {text}" for name, text in item.items()))
        elif value == {}:
            continue
        elif key == "outputs":
            print("outputs: " + ", ".join(value))
        elif isinstance(value, list) and value and all(isinstance(v, float) for v in value):
            print(f"{key} by prefix: " + "  ".join(f"{v:.4g}" for v in value))
        elif isinstance(value, list) and all(isinstance(v, str) for v in value):
            print("\n".join(value))
        else:
            print(f"{key}: {value:,.4g}" if isinstance(value, float) else f"{key}: {value}")


def _prediction(item: dict[str, Any]) -> None:
    if "tags" in item:
        print(" ".join(f"{word}/{tag}" for word, tag in zip(item["words"], item["tags"], strict=True)))
    elif "masks" in item:
        for place in item["masks"]:
            print(f"{item['text']}: " + ", ".join(f"{g['token']!r} {100 * g['confidence']:.1f} %" for g in place))
    else:
        said = item.get("image", item.get("text"))
        best = ", ".join(f"{c['class']} {100 * c['confidence']:.1f} %" for c in item["classes"])
        print(f"{' | '.join(said) if isinstance(said, list) else said}: {best}")


def _frontier(points: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Points from the smallest file to the largest; a star is for one that no other point beats."""
    full = next(point for point in points if point["plan"] == "full")
    rows: list[tuple[str, ...]] = [("", "plan", "validation", "test", "bytes", "× smaller", "ms, batch 1", "batch 64")]
    for point in sorted(points, key=lambda point: (point["bytes"], -point["accuracy"])):
        test = f"{100 * point['test']['accuracy']:.2f} %" if point["test"] else ""
        size = f"{point['bytes']:,}", f"{full['bytes'] / point['bytes']:.2f}"
        latency = [f"{row['median_ms']:.2f}" for row in point["latency"] or []] or ["", ""]
        lead = "*" if point["leads"] else ""
        rows.append((lead, point["plan"], f"{100 * point['accuracy']:.2f} %", test, *size, *latency))
    return rows


def _facts(items: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Numbers by name of several things alike; lists are left to the report."""
    names = [name for name, value in items[0].items() if not isinstance(value, list)]
    shown = [[item[name] for name in names] for item in items]
    rows = [tuple(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row) for row in shown]
    return [tuple(name.replace("_", " ") for name in names), *rows]


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
