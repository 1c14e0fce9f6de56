"""The page as a person sees it: in Chromium, of a real fleet with emulated engines, under load."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hexgen2.cli.client import generate
from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.main import make_request
from tests.models import make_tiny_llama
from tests.page.browser import CHROMIUM, Browser, browser
from tests.placements import mixed, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt-get install chromium)"),
]

LIVE = "document.body.classList.contains('scripted') && document.getElementById('live').textContent.startsWith('live')"


@pytest.fixture
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    free = dict.fromkeys(("listen", "http_listen", "coordinator", "page_listen"), "127.0.0.1:0")
    given = {"engine": {"kind": "emulated"}, "tokenizer": make_tiny_llama(tmp_path / "tiny"), "drain_s": 5}
    plan = {"plan": write(tmp_path, mixed()), "kv": {"transport": "tcp"}}
    async with Fleet(FleetConfig.model_validate(free | given | plan), tmp_path / "run") as made:
        yield made


async def answered(fleet: Fleet) -> None:
    async for _ in generate(fleet.grpc_address, make_request("hello", max_tokens=3, ignore_eos=True), 60.0):
        pass


async def test_a_fleet_is_seen_at_every_size_and_lives_and_dies_before_ones_eyes(fleet: Fleet, tab: Browser) -> None:
    for _ in range(6):
        await answered(fleet)

    def look() -> None:
        url = fleet.page_url
        # Without scripts it is all there, too.
        tab.scripts(allowed=False)
        tab.screen(1200, 900)
        tab.open(url)
        tab.scripts(allowed=True)
        tab.until("document.querySelectorAll('#routes tbody tr').length === 2")
        for width, dark, phone in ((1200, False, False), (1200, True, False), (390, False, True), (320, True, True)):
            tab.screen(width, 800, dark=dark, phone=phone)
            tab.open(url)
            tab.until(LIVE)
            # Tables scroll inside their own frame, the page never sideways.
            assert tab.ask("document.documentElement.scrollWidth") == width
            assert tab.ask("document.querySelectorAll('svg.flows g.box').length") == 3
            assert tab.ask("[...document.querySelectorAll('#cluster .gpus .gpu')].map(e => e.textContent)") == [
                *("P0", "D0", "C0"),
            ]
        # What a screen reader goes by: every section and picture has a name, every table its heads.
        assert tab.ask("[...document.querySelectorAll('svg[role=img]')].every(e => e.ariaLabel)")
        assert tab.ask("[...document.querySelectorAll('table')].every(e => e.querySelector('th[scope=col]'))")
        assert tab.ask(CONTRAST) == []
        # What is measured arrives without a reload.
        tab.ask("window.mark = 1")
        tab.until("document.querySelector('#routes tbody').textContent.includes('/s')")

    await asyncio.to_thread(look)
    fleet["d"].send(signal.SIGKILL)
    lost = "document.getElementById('state').textContent.includes('d is lost') && window.mark === 1"
    await asyncio.to_thread(tab.until, lost)
    assert await asyncio.to_thread(tab.ask, "document.querySelectorAll('#cluster .gpus .gpu.lost').length") == 1
    assert await asyncio.to_thread(tab.ask, "document.getElementById('changes').textContent.includes('d is lost')")
    fleet["coordinator"].send(signal.SIGKILL)
    await fleet["coordinator"].wait()
    away = "document.getElementById('live').textContent"
    assert (await asyncio.to_thread(tab.until, f"{away}.startsWith('coordinator away since') && {away}")).endswith(
        "this is what it said last"
    )
    await fleet["coordinator"].start()
    await asyncio.to_thread(tab.until, f"{LIVE} && window.mark === 1")
    refused = [each for each in tab.complaints if "ERR_CONNECTION" not in each]
    assert not refused


#: Texts whose contrast with what is behind them is below WCAG's 4.5 : 1.
CONTRAST = """
(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('svg') || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const a = lum(parse(getComputedStyle(e).color)), b = lum(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push(`${e.tagName}.${e.className}: ${e.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return found;
})()
"""
