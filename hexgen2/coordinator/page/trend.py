"""How a measured time went in the last minutes, as a small line beside the plan's promise. Pure."""

from collections import deque
from dataclasses import dataclass, field

from hexgen2.coordinator.page.view import View

#: A point each so many seconds, so many of them: a quarter of an hour.
EVERY_S = 5.0
MOST_POINTS = 180
WIDTH, HEIGHT = 180, 36


@dataclass
class Trend:
    """Of one of the view's comparisons. A point without a value is a gap."""

    name: str
    points: deque[float | None] = field(default_factory=lambda: deque(maxlen=MOST_POINTS))

    def svg(self, planned: float | None) -> str:
        """The line, and the promise as a dashed one; nothing before there are two points."""
        known = [point for point in self.points if point is not None]
        if len(known) < 2:
            return ""
        top = 1.15 * max(*known, planned or 0.0) or 1.0

        def y(value: float) -> float:
            return HEIGHT - 1 - (HEIGHT - 2) * value / top

        step = WIDTH / (MOST_POINTS - 1)
        begin = MOST_POINTS - len(self.points)
        parts, pen = [], "M"
        for number, point in enumerate(self.points):
            if point is None:
                pen = "M"
                continue
            parts.append(f"{pen}{(begin + number) * step:.1f},{y(point):.1f}")
            pen = "L"
        dashed = "" if planned is None else f'<path class="promise" d="M0,{y(planned):.1f} L{WIDTH},{y(planned):.1f}"/>'
        return (
            f'<svg class="trend" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{self.name}, the last quarter '
            f'of an hour{"" if planned is None else "; dashed: the plan"}">{dashed}<path d="{" ".join(parts)}"/></svg>'
        )


class Trends:
    """Of every comparison; whoever owns it adds a view each ``EVERY_S``."""

    def __init__(self) -> None:
        self._trends: dict[str, Trend] = {}

    def add(self, view: View) -> None:
        """Take a view's values."""
        for each in view.compared:
            self._trends.setdefault(each.name, Trend(each.name)).points.append(each.measured)

    def all(self) -> tuple[Trend, ...]:
        """As drawn."""
        return tuple(self._trends.values())
