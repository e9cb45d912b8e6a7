"""The table, the JSON file and the plot of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import config
from .measure import Result
from .peers import OURS, ROOFLINE, versions


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def names(results: list[Result]) -> list[str]:
    """The peers that were timed, in order."""
    return list(dict.fromkeys(n for r in results for n in r.seconds if n not in (OURS.name, ROOFLINE.name)))


def table(results: list[Result]) -> str:
    """One line per work: our time, and how many times as long the others take."""
    peers = names(results)
    rows = [["", "fusedstep", "GB/s", "of roofline", *peers]]
    for result in results:
        share = result.ratio(ROOFLINE.name)
        ratios = [result.ratio(name) for name in peers]
        rows.append(
            [
                str(result.work),
                duration(result.median(OURS.name)),
                f"{result.bytes_per_second / 1e9:.3g}",
                f"{share:.2f}" if share else "",
                *(f"{ratio:.3g} x" if ratio else "" for ratio in ratios),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]
    refused: dict[str, list[str]] = {}
    for result in results:
        for name, why in result.refused.items():
            refused.setdefault(f"{name}: {why}", []).append(f"({result.work})")
    for why, works in refused.items():
        lines.append(f"{why} {works[0]}" + (f" and {len(works) - 1} more" if len(works) > 1 else ""))
    return "\n".join(line.rstrip() for line in lines)


def save(results: list[Result], path: Path) -> None:
    """Everything measured, as JSON."""
    machine: dict[str, Any] = {**config(), **versions()}
    found = [
        {
            **result.work._asdict(),
            "threads": result.threads,
            "elements": result.work.n_elements,
            "bytes_per_element": result.work.bytes_per_element,
            "seconds": result.seconds,
            "refused": result.refused,
        }
        for result in results
    ]
    path.write_text(json.dumps({"machine": machine, "results": found}, indent=1, default=str) + "\n")


def plot(results: list[Result], path: Path) -> None:
    """Time per element against size, and ratios: of the first work's rule and type."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peers = names(results)
    colours = {name: f"C{i}" for i, name in enumerate([OURS.name, *peers])} | {ROOFLINE.name: "black"}
    alike = results[0].work
    series = [r for r in results if len(r.work.shapes) == 1 and r.work._replace(size=alike.size) == alike]
    series.sort(key=lambda result: result.work.n_elements)
    others = [
        r for r in results if r.work._replace(size=alike.size, clip_norm=alike.clip_norm) == alike and len(r.seconds) > 2
    ]
    height = max(5.0, 0.08 * sum(len(r.seconds) + 1 for r in others))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, height), layout="constrained")
    for name, colour in colours.items():
        points = [(r.work.n_elements, 1e9 * r.median(name) / r.work.n_elements) for r in series if name in r.seconds]
        if points:
            style = {"linestyle": ":"} if name == ROOFLINE.name else {"marker": "o"}
            left.plot(*zip(*points), color=colour, label=name, linewidth=3 if name == OURS.name else 1, **style)
    left.set(xscale="log", yscale="log", xlabel="elements of one array", ylabel="nanoseconds per element and step")
    left.set_title(f"{results[0].work.rule}, {results[0].work.dtype}, {results[0].threads} threads")
    left.grid(alpha=0.3)
    left.legend()

    place, ticks = 0.0, []
    for result in others:
        shown = [(name, ratio) for name in peers if (ratio := result.ratio(name))]
        ticks.append((place + (len(shown) - 1) / 2, str(result.work)))
        for name, ratio in shown:
            right.barh(place, ratio, color=colours[name], height=0.9)
            place += 1
        place += 1
    right.axvline(1, color=colours[OURS.name], linewidth=3)
    right.set(xscale="log", xlabel="times as long as fusedstep")
    right.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
    right.invert_yaxis()
    right.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
