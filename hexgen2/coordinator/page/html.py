"""The page, from what is shown (``view``): complete without a script, which only fetches it again. Pure.

All that comes from outside goes through ``escape``; no style and no script stands in the page itself, so that its
policy can forbid both.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

from hexgen2.coordinator.page import draw
from hexgen2.coordinator.page.trend import Trend
from hexgen2.coordinator.page.view import Compared, MachineView, ReplicaView, View
from hexgen2.plan import PlanChange

#: More rows are for programs: ``state.json`` has all.
MOST_ROWS = 200
MOST_CHANGES = 8

#: Of cells with a number.
_N = ' class="n"'

_LEVELS = {"ok": "✓ All is well", "warn": "! Look at this", "bad": "✕ Nothing can be served"}
_VERDICTS = {"kept": "✓ as planned", "worse": "▲ longer than planned", "": ""}


def page(view: View, trends: Sequence[Trend] = ()) -> str:
    """The whole document."""
    model = escape(view.model or "no model yet")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>HexGen-2: {model}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="page.css">
<noscript><meta http-equiv="refresh" content="5"></noscript>
<script src="page.js" defer></script>
</head>
<body>
<header>
<h1>{model}</h1>
<p class="quiet">{escape(view.title)}</p>
<p id="live" class="quiet" role="status">{_time(view.unix_s)} UTC</p>
</header>
<main>
{_state(view)}
{_now(view, trends)}
{_cluster(view)}
{_flows(view)}
{_replicas(view)}
{_routes(view)}
{_kv(view)}
{_changes(view)}
</main>
<footer class="quiet">HexGen-2 · read only · <a href="state.json">state.json</a></footer>
</body>
</html>
"""


def _state(view: View) -> str:
    troubles = "".join(f"<li>{escape(each)}</li>" for each in view.troubles)
    return (
        f'<section id="state" class="state {view.level}"><h2>{_LEVELS[view.level]}</h2>'
        + (f"<ul>{troubles}</ul>" if troubles else "")
        + "</section>"
    )


def _now(view: View, trends: Sequence[Trend]) -> str:
    cards = [_card(each, trend) for each, trend in _beside(view.compared, trends)]
    cards.append(
        f'<div class="card"><h3>Under way</h3><p class="big">{view.in_flight}</p>'
        f"<p>{view.waiting} wait · {_number(view.arrivals_rps, '/s')} arrive</p></div>"
    )
    over = f"the last {view.window_s:.0f} s" if view.window_s else "nothing measured yet"
    return (
        f'<section id="now" aria-labelledby="now-h"><h2 id="now-h">Now, against the plan <small>{over}</small></h2>'
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _beside(compared: Sequence[Compared], trends: Sequence[Trend]) -> Iterable[tuple[Compared, Trend | None]]:
    by_name = {trend.name: trend for trend in trends}
    return ((each, by_name.get(each.name)) for each in compared)


def _card(each: Compared, trend: Trend | None) -> str:
    planned = "no plan" if each.planned is None else f"planned: {_most(each)}{_value(each.planned, each.unit)}"
    verdict = f'<span class="{each.verdict}">{_VERDICTS[each.verdict]}</span>' if each.verdict else ""
    picture = trend.svg(each.planned if each.unit == "s" else None) if trend else ""
    return (
        f'<div class="card"><h3>{escape(each.name)}</h3><p class="big">{_value(each.measured, each.unit)}</p>'
        f"<p>{planned} {verdict}</p>{picture}</div>"
    )


def _most(each: Compared) -> str:
    return "" if each.unit == "s" else "at most "


def _cluster(view: View) -> str:
    replicas = {each.id: each for each in view.replicas}
    machines = "".join(_machine(each, replicas) for each in view.machines)
    keys = "".join(
        f'<li><span class="gpu {role}" aria-hidden="true">{letter}</span> {role}</li>'
        for role, letter in (("prefill", "P"), ("decode", "D"), ("colocated", "C"))
        if any(each.role == role for each in view.replicas)
    )
    idle = any(not cell.replica for machine in view.machines for gpus in machine.gpus for cell in gpus.cells)
    keys += '<li><span class="gpu idle" aria-hidden="true">·</span> idle</li>' if idle else ""
    lost = any(each.state == "lost" for each in view.replicas)
    keys += '<li><span class="gpu lost" aria-hidden="true">✕</span> lost</li>' if lost else ""
    return (
        '<section id="cluster" aria-labelledby="cluster-h"><h2 id="cluster-h">Cluster</h2>'
        f'<ul class="legend">{keys}</ul><ul class="machines">{machines}</ul></section>'
    )


def _machine(machine: MachineView, replicas: dict[str, ReplicaView]) -> str:
    parts = []
    for gpus in machine.gpus:
        cells = []
        for cell in gpus.cells:
            owner = replicas.get(cell.replica)
            if owner is None:
                cells.append('<span class="gpu idle" title="idle">·<span class="sr"> idle</span></span>')
                continue
            lost = " lost" if owner.state == "lost" else "" if owner.state == "ready" else " starting"
            tip = f"{owner.id}: {owner.role}, {owner.state}"
            text = f"✕{owner.label}" if lost == " lost" else owner.label
            cells.append(f'<span class="gpu {owner.role}{lost}" title="{escape(tip)}">{escape(text)}</span>')
        kind = f"{len(gpus.cells)} {gpus.kind}" if gpus.kind else _count(len(gpus.cells), "replica")
        parts.append(f'<p class="kind">{escape(kind)}</p><div class="gpus">{"".join(cells)}</div>')
    return f'<li class="machine"><h3>{escape(machine.name)}</h3>{"".join(parts)}</li>'


def _flows(view: View) -> str:
    levels = (*((name, told) for _, name, told in draw.LEVELS), draw.OVER)
    keys = "".join(
        f'<li><svg class="key" viewBox="0 0 22 10" aria-hidden="true"><path class="flow {name}" stroke-width="5" '
        f'd="M1,5 L21,5"/></svg> {told}</li>'
        for name, told in levels
    )
    planned = any(each.planned_rps is not None for each in view.routes)
    legend = f'<ul class="legend" aria-label="use of the planned flow">{keys}</ul>' if planned else ""
    return (
        '<section id="flows" aria-labelledby="flows-h"><h2 id="flows-h">Flows '
        f"<small>as wide as their requests per second</small></h2>{legend}{draw.flows(view)}</section>"
    )


def _replicas(view: View) -> str:
    rows = []
    for each in view.replicas[:MOST_ROWS]:
        rate = _number(each.measured_rps, "/s")
        planned = "" if each.planned_rps is None else f" of {each.planned_rps:.3g}"
        used = "" if each.kv_used is None else _bar(each.kv_used, f"{each.kv_used:.0%}")
        rows.append(
            f'<tr><th scope="row"><span class="gpu {escape(each.role)}">{escape(each.label)}</span> '
            f"{escape(each.id)}</th><td>{escape(each.role)}</td><td>{_dot(each.state)}</td>"
            f'<td class="n">{rate}{planned}</td><td class="n">{each.in_flight}</td><td class="n">{each.running}</td>'
            f'<td class="n">{each.waiting}</td><td>{used}</td>'
            f'<td class="n">{_bytes(each.kv.bytes_per_s, "/s")}</td>'
            f"<td>{escape(each.gpus)}</td><td>{escape(each.transport)}</td><td>{escape(each.address)}</td></tr>"
        )
    heads = (
        *("Replica", "Role", "State", "Requests/s", "In flight", "Running", "Waiting"),
        *("KV memory", "KV in", "GPUs", "Transport", "Address"),
    )
    return _table("replicas", "Replicas and queues", heads, rows, len(view.replicas), numbers=(3, 4, 5, 6, 8))


def _routes(view: View) -> str:
    rows = []
    for each in view.routes[:MOST_ROWS]:
        ends = (
            f'<th scope="row">{escape(each.prefill)} <span class="quiet">whole</span></th>'
            if each.prefill == each.decode
            else f'<th scope="row">{escape(each.prefill)} → {escape(each.decode)}</th>'
        )
        use = "" if each.utilisation is None else _bar(each.utilisation, f"{each.utilisation:.0%}")
        rows.append(
            f'<tr>{ends}<td class="n">{each.share:.1%}</td><td class="n">{_number(each.planned_rps, "/s")}</td>'
            f'<td class="n">{_number(each.measured_rps, "/s")}</td><td>{use}</td>'
            f'<td class="n">{each.in_flight}</td><td>{escape(each.codec)}</td></tr>'
        )
    heads = ("Route", "Share", "Planned", "Measured", "Use", "In flight", "KV as")
    return _table("routes", "Routes", heads, rows, len(view.routes), numbers=(1, 2, 3, 5))


def _kv(view: View) -> str:
    kv = view.kv
    rows = [
        f'<tr><th scope="row">{escape(each.id)}</th><td class="n">{each.kv.transfers}</td>'
        f'<td class="n">{_bytes(each.kv.bytes_per_s, "/s")}</td><td class="n">{_count_or_none(each.kv.corrupt)}</td>'
        f'<td class="n">{_bytes(each.kv.quarantine_bytes)}</td></tr>'
        for each in view.replicas[:MOST_ROWS]
        if each.role == "decode" or each.kv.transfers or each.kv.corrupt or each.kv.quarantine_bytes
    ]
    rows.append(
        f'<tr class="total"><th scope="row">all</th><td class="n">{kv.transfers}</td>'
        f'<td class="n">{_bytes(kv.bytes_per_s, "/s")}</td><td class="n">{_count_or_none(kv.corrupt)}</td>'
        f'<td class="n">{_bytes(kv.quarantine_bytes)}</td></tr>'
    )
    heads = ("To", "Hand-offs, last minute", "Bandwidth", "Digest failures", "Quarantine")
    return _table("kv", "KV hand-off", heads, rows, len(rows), numbers=(1, 2, 3, 4))


def _changes(view: View) -> str:
    rows = [_change(each, view.unix_s) for each in view.changes[:MOST_CHANGES]]
    return _table("changes", "Last plan changes", ("When", "Why", "Epoch"), rows, len(view.changes), numbers=())


def _change(each: PlanChange, now_s: float) -> str:
    why = each.why if each.what == "members" else f"{each.what}: {each.why}"
    when = f'<time datetime="{datetime.fromtimestamp(each.unix_s, UTC):%Y-%m-%dT%H:%M:%SZ}">{_time(each.unix_s)}</time>'
    return (
        f'<tr><td>{when} <span class="quiet">{_ago(now_s - each.unix_s)}</span></td>'
        f'<td class="why">{escape(why)}</td><td class="quiet">{each.epoch}</td></tr>'
    )


def _table(
    name: str, title: str, heads: Sequence[str], rows: Sequence[str], total: int, *, numbers: Sequence[int]
) -> str:
    head = "".join(f'<th scope="col"{_N if number in numbers else ""}>{each}</th>' for number, each in enumerate(heads))
    more = f'<p class="quiet">And {total - len(rows)} more.</p>' if total > len(rows) else ""
    body = "".join(rows) or f'<tr><td colspan="{len(heads)}" class="quiet">none</td></tr>'
    return (
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{title}</h2>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-h"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}</section>"
    )


def _dot(state: str) -> str:
    sign = {"ready": "●", "lost": "✕"}.get(state, "◐")
    return f'<span class="is-{escape(state)}"><span aria-hidden="true">{sign}</span> {escape(state)}</span>'


def _bar(share: float, text: str) -> str:
    width = max(0.0, min(1.0, share)) * 60
    return (
        '<svg class="bar" viewBox="0 0 60 8" aria-hidden="true"><rect width="60" height="8" rx="3"/>'
        f'<rect class="{draw.level(share)}" width="{width:.1f}" height="8" rx="3"/></svg> {escape(text)}'
    )


def _time(unix_s: float) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%H:%M:%S}"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "—"
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


def _number(value: float | None, unit: str) -> str:
    return "—" if value is None else f"{value:.2g}{unit}"


def _bytes(value: float | None, unit: str = "") -> str:
    if value is None:
        return "—"
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {name}{unit}"
    return f"{value:.0f} B{unit}"


def _count_or_none(count: int) -> str:
    return f'<span class="bad">▲ {count}</span>' if count else "none"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
