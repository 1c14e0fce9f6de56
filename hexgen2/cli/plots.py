"""Pictures of simulations, by matplotlib where it is installed (``pip install 'hexgen2[plots]'``)."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Name of a line, and its points.
Lines = Mapping[str, Sequence[tuple[float, float]]]


def available() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def lines(path: Path, series: Lines, *, title: str, x: str, y: str, log_x: bool = False) -> None:
    """One line for each name."""
    figure, axes = _figure(title, x, y)
    for name, points in series.items():
        ordered = sorted(points)
        axes.plot([p[0] for p in ordered], [p[1] for p in ordered], marker="o", markersize=3, label=name)
    if log_x:
        axes.set_xscale("log")
    _save(figure, axes, path, legend=len(series) > 1)


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], *, title: str, y: str) -> None:
    """A cluster of bars for each group; inner names are the same in all."""
    figure, axes = _figure(title, "", y)
    names = list(dict.fromkeys(name for inner in groups.values() for name in inner))
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        places = [place + number * width for place in range(len(groups))]
        axes.bar(places, [inner.get(name, 0.0) for inner in groups.values()], width=width, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(groups))], list(groups), rotation=20, ha="right")
    _save(figure, axes, path, legend=len(names) > 1)


def pareto(path: Path, points: Sequence[tuple[str, float, float]], *, title: str) -> None:
    """(name, $/h, goodput): all of them, and the line of those that nothing cheaper beats."""
    figure, axes = _figure(title, "$ per hour", "goodput, requests/s")
    axes.scatter([p[1] for p in points], [p[2] for p in points], s=18)
    for name, price, goodput in points:
        axes.annotate(name, (price, goodput), fontsize=7, xytext=(4, 3), textcoords="offset points")
    front = best(points)
    axes.step([p[1] for p in front], [p[2] for p in front], where="post", linewidth=1, label="none cheaper does more")
    _save(figure, axes, path, legend=True)


def best(points: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Those that no other beats in price and goodput at once, cheapest first."""
    front: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda p: (p[1], -p[2])):
        if not front or point[2] > front[-1][2]:
            front.append(point)
    return front


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path, *, legend: bool) -> None:
    import matplotlib

    if legend:
        axes.legend(fontsize=7)
    # The same picture gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "hexgen2"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
