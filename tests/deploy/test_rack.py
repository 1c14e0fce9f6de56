"""The rack of containers: its files are deployable, its clients pass over what drains, and fail for what is wrong."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from benchmarks.rack import command, files, load, report
from hexgen2.cli.deploy import deploy
from hexgen2.placement import to_yaml

GATEWAYS = ("http://a", "http://c")


def _answer(text: str, finish: str = "length") -> httpx.Response:
    events = [{"choices": [{"text": text, "finish_reason": finish}]}]
    return httpx.Response(200, text="".join(f"data: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n")


async def _asked(*answers: httpx.Response | httpx.ConnectError) -> load.Tally:
    """One request, whose attempts get these answers."""
    waiting = iter(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        found = next(waiting)
        if isinstance(found, httpx.ConnectError):
            raise found
        return found

    tally = load.Tally()
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        await load.one(client, GATEWAYS, "m", 0, tally)
    return tally


async def test_a_draining_gateway_and_one_that_is_away_are_passed_over() -> None:
    tally = await _asked(httpx.Response(503), httpx.ConnectError("away"), _answer("x"))
    assert tally.passed_over == Counter({"http://a 503": 1, "http://c not there": 1})
    assert tally.answered == Counter({"http://a": 1})
    assert tally.failed == []


@pytest.mark.parametrize(
    "answers",
    [
        [_answer("x", "stop")],
        [httpx.Response(200, text='data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n')],
        [httpx.Response(500)],
        [httpx.Response(503)] * 4,
    ],
    ids=["ended early", "broke off", "an error", "nobody"],
)
async def test_everything_else_is_a_failure(answers: list[httpx.Response]) -> None:
    tally = await _asked(*answers)
    assert len(tally.failed) == 1
    assert not tally.answered


def test_plan_and_inventory_are_deployed(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(to_yaml(files.plan()), encoding="utf-8")
    (tmp_path / "inventory.yaml").write_text(files.inventory("M", 100, "x-1-py3-none-any.whl"), encoding="utf-8")
    for name in ("constraints.txt", "x-1-py3-none-any.whl"):
        (tmp_path / name).touch()
    words = ["baremetal", str(tmp_path / "plan.yaml"), "--inventory", str(tmp_path / "inventory.yaml")]
    result = CliRunner().invoke(deploy, [*words, "-o", str(tmp_path / "rack")], catch_exceptions=False)
    assert result.exit_code == 0
    for replica, host in files.REPLICAS.items():
        assert (tmp_path / "rack" / "files" / host / "units" / f"hexgen2-worker-{replica}.service").is_file()


async def test_a_command_ends_with_its_children_when_nobody_waits_for_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    await command.run("mkfifo", fifo, limit_s=20)
    waits = asyncio.create_task(command.run("sh", "-c", f"(echo begun; exec sleep 600) > {fifo} & wait", limit_s=600))
    with await asyncio.to_thread(fifo.open) as held:
        assert await asyncio.to_thread(held.readline) == "begun\n"
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert await asyncio.to_thread(held.read) == ""


@pytest.mark.parametrize(("failures", "left"), [(("x",), ()), ((), ("a: releases 1, 2",))])
def test_what_failed_and_what_was_left_are_told(failures: tuple[str, ...], left: tuple[str, ...]) -> None:
    fine = report.Result(3, ("1", "2"), {}, {"a": 2}, {}, (), 0.1, ())
    assert fine.ok
    assert not report.Result(3, ("1", "2"), {}, {"a": 2}, {}, failures, 0.1, left).ok
    assert not report.Result(3, ("1", "2"), {}, {}, {}, (), 0.1, ()).ok
