"""A plan as one page for people: HTML with its picture inside, no script and nothing to fetch.

The picture has sites as frames, machines as boxes, GPUs as squares coloured by the role of their group and numbered by
replica; routes are lines as wide as their flow, and what binds is drawn in red.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hexgen2.cluster import Cluster
from hexgen2.placement import Placement, ReplicaPlan

COLOURS = {"prefill": "#2f6fde", "decode": "#1f9d63", "colocated": "#9a4fd0", "idle": "#c9ced6"}
RED, FLOW = "#d43b3b", "#e0900f"

#: Sizes in the picture.
CELL, GAP, PAD, HEAD, COLUMN = 30, 5, 12, 26, 250
#: Machines beyond so many are not drawn one by one.
MOST_MACHINES, MOST_ROUTES = 40, 60


@dataclass(frozen=True, slots=True)
class Change:
    """What would change the answer: one more or one faster thing, and the flow that the plan would then have."""

    what: str
    throughput_rps: float


def html(plan: Placement, cluster: Cluster, changes: Sequence[Change] = (), assumptions: Sequence[str] = ()) -> str:
    """The whole page."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(plan.model)} on {escape(plan.cluster)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d232b; max-width: 1120px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.5em; margin: 0 }} h2 {{ font-size: 1.15em; margin: 2em 0 .5em }}
.sub {{ color: #5b6470; margin: .2em 0 1.2em }}
.cards {{ display: flex; flex-wrap: wrap; gap: 12px; margin: 1em 0 }}
.card {{ border: 1px solid #dfe3e8; border-radius: 8px; padding: 10px 16px; min-width: 120px }}
.card b {{ display: block; font-size: 1.35em }} .card span {{ color: #5b6470; font-size: .88em }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid #e8ebef; vertical-align: top }}
th {{ color: #5b6470; font-weight: 500 }}
td:first-child, td.n {{ white-space: nowrap }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums }}
.dot {{ display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .45em }}
.bar {{ background: #edf0f3; border-radius: 4px; height: 9px; width: 110px; display: inline-block }}
.bar i {{ display: block; height: 9px; border-radius: 4px }}
svg {{ box-sizing: border-box; max-width: 100%; height: auto }}
svg {{ border: 1px solid #dfe3e8; border-radius: 8px; background: #fbfcfd }}
.legend span {{ margin-right: 1.4em }} .scroll {{ overflow-x: auto }}
</style></head><body>
<h1>{plan.throughput_rps:.3g} requests/s of {escape(plan.workload)} with {escape(plan.model)}</h1>
<p class="sub">on {escape(plan.cluster)}: {escape(plan.kind)} ({escape(plan.why)})</p>
{_cards(plan)}
<h2>Where everything runs</h2>
{_legend(plan)}
<div class="scroll">{picture(plan, cluster)}</div>
<h2>Replicas</h2>
{_replicas(plan)}
{_links(plan)}
{_changes(plan, changes)}
{_runners_up(plan)}
{_assumed(assumptions)}
<p class="sub">Strategy {escape(plan.strategy)}, seed {plan.seed}, {plan.evaluations:,} evaluations.</p>
</body></html>
"""


def _cards(plan: Placement) -> str:
    cards = [
        (f"{plan.output_tokens_per_s:,.0f}", "output tokens/s"),
        ("—" if plan.ttft_s is None else f"{plan.ttft_s:.2f} s", f"TTFT at {plan.load_rps:.3g} requests/s"),
        (f"{plan.tpot_s * 1e3:.0f} ms", "time per output token"),
        (plan.bottleneck, "bottleneck"),
    ]
    if plan.gap is not None and plan.bound_rps is not None:
        cards.append((f"{plan.gap:.1%}", f"below the bound of {plan.bound_rps:.3g} requests/s ({plan.bound_method})"))
    if plan.price_per_hour is not None:
        cards.append((f"{plan.price_per_hour:.2f} $/h", "price"))
    if plan.price_per_million_output_tokens is not None:
        cards.append((f"{plan.price_per_million_output_tokens:.2f} $", "per million output tokens"))
    told = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in cards
    )
    return f'<div class="cards">{told}</div>'


def _legend(plan: Placement) -> str:
    roles = [role for role in COLOURS if role != "idle" and any(each.role == role for each in plan.replicas)]
    if plan.idle:
        roles.append("idle")
    told = "".join(f'<span><i class="dot" style="background:{COLOURS[role]}"></i>{role}</span>' for role in roles)
    return (
        f'<p class="legend">{told}<span style="color:{RED}">red: full</span>'
        f'<span style="color:{FLOW}">lines: KV from prefill to decode, as wide as its flow</span>'
        "numbers: replica of that role</p>"
    )


@dataclass(frozen=True, slots=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


def picture(plan: Placement, cluster: Cluster) -> str:
    """The cluster as SVG. Machines beyond `MOST_MACHINES`, and the thinnest routes, are left out, and it says so."""
    owners = _owners(plan)
    sites: dict[str, list[str]] = {}
    for machine in cluster.machines[:MOST_MACHINES]:
        sites.setdefault(machine.site, []).append(machine.name)
    gpus = {machine.name: machine.gpus for machine in cluster.machines}
    full = {link.name for link in plan.links if link.utilisation > 0.999}
    columns = 4
    parts: list[str] = []
    places: dict[str, list[tuple[float, float]]] = {}
    y = float(PAD)
    for site, names in sites.items():
        top = y
        y += HEAD if len(sites) > 1 else 0
        for row in range(0, len(names), columns):
            height = 0.0
            for number, name in enumerate(names[row : row + columns]):
                x = PAD * 2 + number * (COLUMN + PAD * 2)
                box = _machine(parts, name, gpus[name], owners, _Box(x, y, COLUMN, 0), full, places)
                height = max(height, box.height)
            y += height + PAD * 2.5
        if len(sites) > 1:
            parts.insert(
                0,
                f'<rect x="{PAD}" y="{top}" width="{columns * (COLUMN + PAD * 2)}" height="{y - top - PAD}" rx="8" '
                f'fill="none" stroke="#cfd5dc" stroke-dasharray="5 4"/><text x="{PAD * 2}" y="{top + 18}" '
                f'font-size="13" fill="#5b6470">{escape(site)}</text>',
            )
        y += PAD
    width = PAD * 3 + min(columns, max(map(len, sites.values()))) * (COLUMN + PAD * 2)
    left_out = []
    if len(cluster.machines) > MOST_MACHINES:
        left_out.append(f"{len(cluster.machines) - MOST_MACHINES} more machines")
    lines, omitted = _routes(plan, places)
    # Above the lines, so that they can be read; the pointer goes through to what lies below.
    numbers = "".join(
        f'<text x="{x}" y="{at + 5}" font-size="13" fill="white" text-anchor="middle" pointer-events="none">'
        f"{replica.rsplit('-', 1)[1]}</text>"
        for replica, cells in places.items()
        for x, at in cells
    )
    if omitted:
        left_out.append(f"{omitted} thinner routes")
    if left_out:
        parts.append(f'<text x="{PAD * 2}" y="{y}" font-size="13">not drawn: {" and ".join(left_out)}</text>')
        y += HEAD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y:.0f}" width="{width:.0f}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="cluster and flows">{"".join(parts)}{lines}'
        f"{numbers}</svg>"
    )


def _machine(
    parts: list[str],
    name: str,
    gpus: Sequence[tuple[str, int]],
    owners: Mapping[tuple[str, str], list[ReplicaPlan | None]],
    at: _Box,
    full: set[str],
    places: dict[str, list[tuple[float, float]]],
) -> _Box:
    per_row = (COLUMN - 2 * PAD) // (CELL + GAP)
    y = at.y + HEAD + 4
    inner: list[str] = []
    for gpu, count in gpus:
        inner.append(f'<text x="{at.x + PAD}" y="{y + 9}" font-size="11" fill="#5b6470">{count} {escape(gpu)}</text>')
        y += 16
        cells = owners.get((name, gpu), [None] * count)
        for i, owner in enumerate(cells):
            cx, cy = at.x + PAD + i % per_row * (CELL + GAP), y + i // per_row * (CELL + GAP)
            colour = COLOURS[owner.role if owner else "idle"]
            tip = f"{owner.id}: {owner.flow_rps:.3g} of {owner.capacity_rps:.3g} requests/s" if owner else "idle"
            hot = f' stroke="{RED}" stroke-width="2.5"' if owner and owner.utilisation > 0.999 else ""
            inner.append(
                f'<g><title>{escape(tip)}</title><rect x="{cx}" y="{cy}" width="{CELL}" height="{CELL}" rx="5" '
                f'fill="{colour}"{hot}/></g>'
            )
            if owner:
                places.setdefault(owner.id, []).append((cx + CELL / 2, cy + CELL / 2))
        y += (len(cells) + per_row - 1) // per_row * (CELL + GAP) + 4
    height = y - at.y + PAD / 2
    cards = [way for way in ("out", "in") if f"{name} {way}" in full]
    note = f' <tspan fill="{RED}">network card {" and ".join(cards)} full</tspan>' if cards else ""
    parts.append(
        f'<rect x="{at.x}" y="{at.y}" width="{COLUMN}" height="{height}" rx="7" fill="white" '
        f'stroke="{RED if cards else "#b9c1cb"}"/><text x="{at.x + PAD}" y="{at.y + 18}" font-size="13" '
        f'font-weight="600">{escape(name)}{note}</text>'
    )
    parts.extend(inner)
    return _Box(at.x, at.y, COLUMN, height)


def _owners(plan: Placement) -> dict[tuple[str, str], list[ReplicaPlan | None]]:
    owners: dict[tuple[str, str], list[ReplicaPlan | None]] = {}
    for replica in plan.replicas:
        for place, count in replica.gpus.items():
            owners.setdefault(place, []).extend([replica] * count)
    for idle in plan.idle:
        owners.setdefault((idle.machine, idle.gpu), []).extend([None] * idle.count)
    return owners


def _routes(plan: Placement, places: Mapping[str, list[tuple[float, float]]]) -> tuple[str, int]:
    drawn = [route for route in plan.routes if route.prefill in places and route.decode in places]
    drawn.sort(key=lambda route: -route.flow_rps)
    thickest = drawn[0].flow_rps if drawn else 1.0
    lines = []
    for route in drawn[:MOST_ROUTES]:
        ends = (places[route.prefill], places[route.decode])
        # Between the two GPUs that are nearest to each other: replicas may stand on several machines.
        (ax, ay), (bx, by) = min(((a, b) for a in ends[0] for b in ends[1]), key=lambda pair: _far(*pair))
        bend = 0.18 * (_far((ax, ay), (bx, by)) ** 0.5) + 12
        width = 1.2 + 8 * route.flow_rps / thickest
        tip = (
            f"{route.prefill} to {route.decode}: {route.flow_rps:.3g} requests/s, KV in {route.transfer_s * 1e3:.3g} ms"
            + (f" as {route.codec}" if route.codec != "none" else "")
        )
        lines.append(
            f'<path d="M{ax:.0f},{ay:.0f} Q{(ax + bx) / 2:.0f},{(ay + by) / 2 + bend:.0f} {bx:.0f},{by:.0f}" '
            f'fill="none" stroke="{FLOW}" stroke-opacity=".55" stroke-linecap="round" stroke-width="{width:.1f}">'
            f"<title>{escape(tip)}</title></path>"
        )
    return "".join(lines), len(plan.routes) - len(lines)


def _far(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def _replicas(plan: Placement) -> str:
    rows = []
    for each in plan.replicas:
        gpus = ", ".join(f"{count} {gpu} on {machine}" for (machine, gpu), count in each.gpus.items())
        stages = ", ".join(f"TP {s.tensor_parallel_size} × {s.num_layers}" for s in each.stages)
        colour = RED if each.utilisation > 0.999 else COLOURS[each.role]
        times = []
        if each.prefill_s is not None:
            times.append(f"{each.prefill_s:.2f} s")
        if each.tpot_s is not None:
            times.append(f"{each.tpot_s * 1e3:.0f} ms, batch {each.batch}")
        rows.append(
            f'<tr><td><i class="dot" style="background:{COLOURS[each.role]}"></i>{escape(each.id)}</td>'
            f"<td>{escape(gpus)}</td><td>{escape(stages)} layers</td>"
            f'<td class="n">{each.flow_rps:.3g}/s of {each.capacity_rps:.3g}</td>'
            f'<td><span class="bar"><i style="width:{each.utilisation:.0%};background:{colour}"></i></span></td>'
            f"<td>{' · '.join(times)}</td></tr>"
        )
    head = '<tr><th>replica</th><th>GPUs</th><th>stages</th><th class="n">requests</th><th>busy</th><th>time</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _links(plan: Placement) -> str:
    busy = sorted(plan.links, key=lambda link: -link.utilisation)[:12]
    if not busy:
        return "<h2>Links</h2><p>No KV crosses machines.</p>"
    rows = []
    for link in busy:
        colour = RED if link.utilisation > 0.999 else "#7b8794"
        rows.append(
            f'<tr><td>{escape(link.name)}</td><td class="n">{link.bytes_per_s / 1e9:.3g} of '
            f'{link.bandwidth_bytes_per_s / 1e9:.3g} GB/s</td><td><span class="bar"><i style="width:'
            f'{min(1.0, link.utilisation):.0%};background:{colour}"></i></span></td></tr>'
        )
    head = '<tr><th>link</th><th class="n">traffic</th><th>busy</th></tr>'
    return f"<h2>Busiest links</h2><table>{head}{''.join(rows)}</table>"


def _changes(plan: Placement, changes: Sequence[Change]) -> str:
    if not changes:
        return ""
    ranked = sorted(changes, key=lambda each: (-each.throughput_rps, each.what))
    rows = "".join(
        f'<tr><td>{escape(each.what)}</td><td class="n">{each.throughput_rps:.3g} requests/s</td>'
        f'<td class="n">{each.throughput_rps / plan.throughput_rps - 1:+.1%}</td></tr>'
        for each in ranked
    )
    return f"<h2>What would change the answer</h2><table>{rows}</table>"


def _assumed(assumptions: Sequence[str]) -> str:
    said = "".join(f"<li>{escape(each)}</li>" for each in assumptions)
    return f"<h2>Taken for granted</h2><ul>{said}</ul>" if said else ""


def _runners_up(plan: Placement) -> str:
    if not plan.runners_up:
        return ""
    rows = "".join(
        f'<tr><td>{escape(each.kind)}</td><td class="n">{each.throughput_rps:.3g} requests/s</td>'
        f"<td>{'<br>'.join(map(escape, each.replicas[:10]))}"
        f"{f'<br>and {len(each.replicas) - 10} more' if len(each.replicas) > 10 else ''}</td></tr>"
        for each in plan.runners_up
    )
    return f"<h2>Runners-up</h2><table>{rows}</table>"
