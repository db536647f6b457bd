"""The results as Markdown: a table for each case, one of memory, and sentences that say who wins."""

from __future__ import annotations

from typing import Any

from networks import Case

TARGET = 1.7  # latency at the smallest batch over the best peer


def best_of_families(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each network and family the row with the shortest time."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["network"], row["family"])
        if key not in best or row["milliseconds"]["median"] < best[key]["milliseconds"]["median"]:
            best[key] = row
    return list(best.values())


def name_of(row: dict[str, Any]) -> str:
    """Family and detail."""
    return f"{row['family']}: {row['detail']}" if row["detail"] else row["family"]


def _spread(numbers: dict[str, float], digits: str) -> str:
    low, high = numbers["lower_quartile"], numbers["upper_quartile"]
    return f"{numbers['median']:{digits}} ({low:{digits}} to {high:{digits}})"


def _kilobytes(by_rank: list[int] | None) -> str:
    return "not counted" if by_rank is None else " + ".join(f"{size / 1000:,.0f}" for size in by_rank)


def _megabytes(by_rank: list[int]) -> str:
    return " + ".join(f"{size / 1e6:,.0f}" for size in by_rank)


def case_table(rows: list[dict[str, Any]]) -> str:
    """One case: the best of every family."""
    lines = [
        "| network | way | ms, median (quartiles) | images/s | speed over best peer | kB sent by each process | "
        "by arithmetic |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in best_of_families(rows):
        mark = " **(best peer)**" if row["is_best_peer"] else ""
        lines.append(
            f"| {row['network']} | {name_of(row)}{mark} | {_spread(row['milliseconds'], '.3g')} "
            f"| {row['images_per_second']['median']:.3g} | {_spread(row['over_best_peer'], '.2f')} "
            f"| {_kilobytes(row['sent_bytes'])} | {_kilobytes(row['payload_bytes'])} |"
        )
    return "\n".join(lines)


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Weights, what a training step holds, and its peak."""
    lines = [
        "| network | way | weights, MB by process | weights, gradients, moments | peak of a training step |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['network']} | {name_of(row)} | {_megabytes(row['parameter_bytes'])} "
            f"| {_megabytes(row['held_bytes'])} | {_megabytes(row['peak_bytes'])} |"
        )
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether the best of ours or the best peer wins a case, in a sentence."""
    mine = min((row for row in rows if row["branches"]), key=lambda row: row["milliseconds"]["median"])
    peer = next(row for row in rows if row["is_best_peer"])
    ratio = mine["over_best_peer"]
    times = f"{mine['milliseconds']['median']:.3g} ms against {peer['milliseconds']['median']:.3g} ms"
    who = f"PF {mine['network']} ({name_of(mine)})", f"{peer['network']} by {name_of(peer)}"
    spread = f"(quartiles {ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})"
    if ratio["lower_quartile"] > 1:
        said = f"ours wins: {who[0]} is {ratio['median']:.2f} {spread} times as fast as {who[1]}"
    elif ratio["upper_quartile"] < 1:
        said = f"**a peer wins**: {who[0]} has {ratio['median']:.2f} {spread} times the speed of {who[1]}"
    else:
        said = f"neither wins: {who[0]} has {ratio['median']:.2f} {spread} times the speed of {who[1]}"
    return f"{rows[0]['case'].capitalize()}, {said}, {times}."


def summary(rows: list[dict[str, Any]], cases: tuple[Case, ...]) -> str:
    """Who wins each case, where a peer does, and whether the target is reached."""
    by_case = [[row for row in rows if row["case"] == case.name] for case in cases]
    by_case = [found for found in by_case if found]
    lines = [f"- {verdict(found)}" for found in by_case]
    lost = [found[0]["case"] for found in by_case if "**a peer wins**" in verdict(found)]
    lines += ["", f"A peer wins at: {'; '.join(lost)}." if lost else "No peer wins any of these."]
    first = by_case[0]
    if first[0]["case"] == cases[0].name:
        reached = max(row["over_best_peer"]["median"] for row in first if row["branches"])
        word = "reached" if reached >= TARGET else "missed"
        lines.append(
            f"The target, {cases[0].name} at least {TARGET} times as fast as the best peer, is {word}: {reached:.2f}."
        )
    return "\n".join(lines)


def report(result: dict[str, Any], cases: tuple[Case, ...]) -> str:
    """Everything, for the README."""
    rows = result["results"]
    parts = [summary(rows, cases)] if rows else []
    for case in cases:
        found = [row for row in rows if row["case"] == case.name]
        if found:
            parts += [f"### {case.name.capitalize()}", case_table(found)]
    if result["memory"]:
        parts += [
            f"### Memory of a training step, batch {result['memory'][0]['batch']}",
            memory_table(result["memory"]),
        ]
    if result["left_out"]:
        parts += ["Left out:", "\n".join(f"- {family}: {reason}" for family, reason in result["left_out"].items())]
    return "\n\n".join(parts)
