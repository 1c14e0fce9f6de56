"""The flows of KV as SVG: prefill on the left, decode on the right, lines as wide as their flow. Pure.

Colours are the style sheet's, by class: of a replica by its role, of a line by its utilisation. Nothing is told by
colour alone: lines have their numbers beside them, or in the table that shows the same.
"""

from collections.abc import Sequence
from html import escape

from hexgen2.coordinator.page.view import ReplicaView, RouteView, View

#: Sizes; a phone shows the picture at about four fifths.
WIDTH, BOX, HEIGHT, STEP, TOP = 440, 132, 34, 50, 26
THIN, THICK = 1.5, 14.0
#: Beyond so many the picture is of the largest flows alone.
MOST_REPLICAS, MOST_ROUTES, MOST_NUMBERS = 24, 80, 12

#: The classes of lines, by the utilisation up to which they are for, and what they are called.
LEVELS = ((0.01, "u0", "nothing now"), (0.5, "u1", "to 50 %"), (0.85, "u2", "to 85 %"), (1.05, "u3", "to 105 %"))
OVER = ("u4", "more than planned")


def level(utilisation: float | None) -> str:
    """The class of a line."""
    if utilisation is None:
        return "unplanned"
    return next((name for limit, name, _ in LEVELS if utilisation <= limit), OVER[0])


def flows(view: View) -> str:
    """The picture, and a sentence on what it leaves out."""
    replicas = {each.id: each for each in view.replicas}
    handed = [each for each in view.routes if each.prefill != each.decode]
    left = _column(handed, [each.prefill for each in handed], [e for e in view.replicas if e.role == "prefill"])
    right = _column(handed, [each.decode for each in handed], [e for e in view.replicas if e.role == "decode"])
    wholes = [each for each in view.replicas if each.role == "colocated"][:MOST_REPLICAS]
    if not (left or right or wholes):
        return '<p class="quiet">Nobody is here yet.</p>'
    rows = max(len(left), len(right))
    y_left, y_right = _places(left, rows), _places(right, rows)
    drawn = [each for each in handed if each.prefill in y_left and each.decode in y_right][:MOST_ROUTES]
    most = max((_flow(each) for each in view.routes), default=0.0) or 1.0
    height = TOP + rows * STEP
    parts = [_head(4, 16, "prefill"), _head(WIDTH - 4, 16, "decode", "end")] if rows else []
    lines, numbers = [], []
    for number, route in enumerate(drawn):
        y1, y2 = y_left[route.prefill], y_right[route.decode]
        x1, x2 = BOX, WIDTH - BOX
        third = (x2 - x1) / 2.4
        width = THIN + (THICK - THIN) * _flow(route) / most
        lines.append(
            f'<path class="flow {level(route.utilisation)}" stroke-width="{width:.1f}" '
            f'd="M{x1},{y1:.0f} C{x1 + third:.0f},{y1:.0f} {x2 - third:.0f},{y2:.0f} {x2},{y2:.0f}">'
            f"<title>{escape(told(route))}</title></path>"
        )
        if number < MOST_NUMBERS:
            # Not all in the middle, where lines cross.
            at = (0.3, 0.5, 0.7)[number % 3]
            smooth = at * at * (3 - 2 * at)
            numbers.append(
                f'<text class="rate" x="{x1 + at * (x2 - x1):.0f}" y="{y1 + (y2 - y1) * smooth + 4:.0f}" '
                f'text-anchor="middle">{escape(rate(route))}</text>'
            )
    parts += [*lines, *numbers]
    parts += [_box(replicas[key], 0, y) for key, y in y_left.items() if key in replicas]
    parts += [_box(replicas[key], WIDTH - BOX, y) for key, y in y_right.items() if key in replicas]
    if wholes:
        parts.append(_head(4, height + 16, "whole requests"))
        height += TOP
        for i, each in enumerate(wholes):
            parts.append(_box(each, i % 3 * (BOX + 22), height + i // 3 * STEP + STEP / 2))
        height += (len(wholes) + 2) // 3 * STEP
    svg = (
        f'<svg class="flows" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Flows from prefill to decode '
        f'replicas; the table of routes has the same">{"".join(parts)}</svg>'
    )
    shown = len(left) + len(right) + len(wholes)
    out = [
        f"{count} {what}"
        for count, what in ((len(view.replicas) - shown, "replicas"), (len(handed) - len(drawn), "smaller routes"))
        if count > 0
    ]
    return svg + (f'<p class="quiet">Not drawn: {" and ".join(out)}.</p>' if out else "")


def told(route: RouteView) -> str:
    """A route in words."""
    planned = "" if route.planned_rps is None else f" of {route.planned_rps:.3g} planned"
    now = "not measured" if route.measured_rps is None else f"{route.measured_rps:.3g} requests/s{planned}"
    codec = "" if route.codec == "none" else f", KV as {route.codec}"
    return f"{route.prefill} to {route.decode}: {now}, {route.in_flight} in flight{codec}"


def rate(route: RouteView) -> str:
    """What is written beside a line."""
    if route.measured_rps is None:
        return f"{route.share:.0%}"
    return f"{route.measured_rps:.2g}/s" if route.measured_rps else "0"


def _flow(route: RouteView) -> float:
    return route.share if route.measured_rps is None else route.measured_rps


def _column(routes: Sequence[RouteView], ends: Sequence[str], all_of_role: Sequence[ReplicaView]) -> list[str]:
    """Ids by the order of their largest routes, so that lines cross little; then those without a route."""
    by_flow = list(dict.fromkeys(ends))[:MOST_REPLICAS]
    return (by_flow + [each.id for each in all_of_role if each.id not in by_flow])[:MOST_REPLICAS]


def _places(ids: Sequence[str], rows: int) -> dict[str, float]:
    """The middle of each box; the shorter column is spread over the height of the longer one."""
    step = rows * STEP / max(1, len(ids))
    return {key: TOP + (number + 0.5) * step for number, key in enumerate(ids)}


def _head(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="head" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def _box(replica: ReplicaView, x: float, y: float) -> str:
    lost = "" if replica.state == "ready" else f" {replica.state}"
    waiting = f", {replica.waiting} wait" if replica.waiting else ""
    told = f"{replica.in_flight} in flight{waiting}" if replica.state == "ready" else replica.state
    name = replica.id if len(replica.id) <= 16 else f"{replica.id[:7]}…{replica.id[-8:]}"
    return (
        f'<g class="box {replica.role}{lost}"><title>{escape(replica.id)}: {escape(told)}</title>'
        f'<rect x="{x + 0.5}" y="{y - HEIGHT / 2:.1f}" width="{BOX - 1}" height="{HEIGHT}" rx="6"/>'
        f'<text class="name" x="{x + 8}" y="{y - 3:.0f}">{escape(name)}</text>'
        f'<text x="{x + 8}" y="{y + 11:.0f}">{escape(told)}</text></g>'
    )
