"""A worker lost at each step: another attempt, which goes on where the client is, or a clear error; never a short
answer, never a token twice.
"""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from hexgen2.errors import (
    EngineFailed,
    HexgenError,
    InvalidRequest,
    KvCorrupt,
    KvTooLarge,
    Overloaded,
    StaleEpoch,
    TransferRefused,
    Unavailable,
)
from hexgen2.gateway.progress import ATTEMPTS
from hexgen2.plan import ReplicaState
from tests.gateway.asking import answer_of, ask, ask_stream
from tests.gateway.house import EOS, House, Script, Worker, fails, first_token, house, rest, silent, tokens, verified

LOST = Unavailable("gone")


def once(script: Script, then: Script) -> Script:
    """``script`` for the first call, ``then`` for the others."""
    scripts = [script]

    def pick(request: Any) -> AsyncGenerator[Any, None]:
        return (scripts.pop() if scripts else then)(request)

    return pick


def first_of(workers: list[Worker], script: Script) -> None:
    """``script`` for the first call that any of them gets, their own for the others."""
    scripts = [script]
    for worker in workers:

        def pick(request: Any, good: Script = worker.script) -> AsyncGenerator[Any, None]:
            return (scripts.pop() if scripts else good)(request)

        worker.script = pick


def lost_with_tokens_out(made: House) -> Script:
    """Decode is lost when the client has two tokens."""

    async def script(_: Any) -> AsyncGenerator[Any, None]:
        yield verified()
        # Ended by the gateway once it has given the first token on.
        await (await made.prefills[0].first_call()).ended()
        yield tokens(made.ids("k"))
        raise LOST

    return script


@pytest.mark.parametrize("error", [LOST, EngineFailed("dead"), StaleEpoch("old plan"), TransferRefused("no")])
async def test_prefill_lost_before_the_first_token_is_replaced(folder: Path, error: HexgenError) -> None:
    async with house(folder, prefills=2) as made:
        made.answers("ok")
        bad = once(fails(error, after=made.decodes[0]), made.prefills[0].script)
        made.prefills[0].script = made.prefills[1].script = bad
        made.decodes[0].script = once(silent, made.decodes[0].script)
        status, body = await ask(made)
        assert (status, answer_of(body)) == (200, "ok")
        calls = [call for worker in made.prefills for call in worker.calls]
        assert len(calls) == 2
        first, second = calls
        # A new attempt is a new transfer under a new secret.
        assert first.request.transfer.transfer_id != second.request.transfer.transfer_id
        assert first.request.transfer.token != second.request.transfer.token
        assert await made.decodes[0].calls[0].ended()
        if isinstance(error, Unavailable):
            assert all(len(worker.calls) == 1 for worker in made.prefills)


async def test_the_only_prefill_is_lost_and_decode_serves_alone(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ok")
        made.prefills[0].script = fails(LOST, after=made.decodes[0])
        made.decodes[0].script = once(silent, rest([*made.ids("ok"), EOS]))
        status, body = await ask(made)
        assert (status, answer_of(body)) == (200, "ok")
        assert not made.decodes[0].calls[-1].request.HasField("remote_kv")


async def test_a_prefill_process_that_is_gone_is_passed_over(folder: Path) -> None:
    async with house(folder, prefills=2) as made:
        made.answers("ok")
        await made.prefills[0].server.stop(0)
        for _ in range(4):
            status, body = await ask(made)
            assert (status, answer_of(body)) == (200, "ok")


async def test_prefill_lost_after_the_first_token_but_decode_has_all(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ok")
        prefill_lost = asyncio.Event()

        async def lost(_: Any) -> AsyncGenerator[Any, None]:
            async for response in first_token(made.ids("o")[0])(_):
                yield response
                if response.HasField("first_token"):
                    prefill_lost.set()
                    raise LOST

        async def has_all(_: Any) -> AsyncGenerator[Any, None]:
            await prefill_lost.wait()
            yield verified()
            yield tokens([*made.ids("k"), EOS], 1)

        made.prefills[0].script, made.decodes[0].script = lost, has_all
        assert await ask_stream(made) == ("ok", True, None)


async def test_prefill_lost_after_the_first_token_and_decode_misses_kv(folder: Path) -> None:
    async with house(folder, prefills=2, decodes=2) as made:

        async def lost(_: Any) -> AsyncGenerator[Any, None]:
            async for response in first_token(made.ids("o")[0])(_):
                yield response
                if response.HasField("first_token"):
                    raise LOST

        made.knows("x", "ok")
        good = made.decodes[0].script

        async def misses(request: Any) -> AsyncGenerator[Any, None]:
            if len(request.prompt_token_ids) == 1:
                for worker in made.prefills:
                    for call in worker.calls:
                        await call.ended()
                raise Unavailable("the transfer ended before it was complete")
            async for response in good(request):
                yield response

        first_of(made.prefills, lost)
        for worker in made.decodes:
            worker.script = misses
        assert await ask_stream(made) == ("ok", True, None)
        # The token that the client has is not sampled a second time.
        assert sorted(made.prompts(made.prefills)) == ["x", "xo"]


async def test_decode_lost_before_verification_costs_no_prefill(folder: Path) -> None:
    async with house(folder, decodes=3) as made:
        made.answers("ok")
        good = made.decodes[0].script
        picked: list[str] = []

        def third_time(request: Any) -> AsyncGenerator[Any, None]:
            picked.append(request.remote_kv.transfer.transfer_id)
            return (good if len(picked) == 3 else fails(LOST))(request)

        for worker in made.decodes:
            worker.script = third_time
        assert await ask_stream(made) == ("ok", True, None)
        assert len(made.prefills[0].calls) == 1
        assert [len(worker.calls) for worker in made.decodes] == [1, 1, 1]
        assert len(set(picked)) == 1


@pytest.mark.parametrize("error", [LOST, KvCorrupt("a digest differs"), Overloaded("staging is full", 0.01)])
async def test_decode_lost_before_verification_and_no_other(folder: Path, error: HexgenError) -> None:
    async with house(folder) as made:
        made.knows("x", "okay")

        async def after_first_token(_: Any) -> AsyncGenerator[Any, None]:
            await said.wait()
            for _ in ():
                yield
            raise error

        said = asyncio.Event()
        good = made.prefills[0].script

        async def says(request: Any) -> AsyncGenerator[Any, None]:
            async for response in good(request):
                yield response
                if response.HasField("first_token"):
                    said.set()

        made.prefills[0].script, made.decodes[0].script = says, after_first_token
        text, done, failure = await ask_stream(made)
        # Each attempt may bring a token further.
        assert text in ("", "o", "ok", "oka")
        assert not done
        assert failure is not None
        for call in made.prefills[0].calls:
            assert await call.ended()


async def test_an_answer_that_breaks_off_is_continued_on_another_replica(folder: Path) -> None:
    async with house(folder, decodes=2) as made:
        made.knows("x", "okay")
        first_of(made.decodes, lost_with_tokens_out(made))
        status, body = await ask(made, logprobs=0)
        assert (status, answer_of(body)) == (200, "okay")
        assert body["usage"] == body["usage"] | {"prompt_tokens": 1, "completion_tokens": 5}
        assert made.prompts(made.prefills) == ["x", "xok"]
        # By the same prefill replica, which did well and has the prompt in its cache, to the other decode replica.
        assert [len(worker.calls) for worker in made.decodes] == [1, 1]
        second = made.prefills[0].calls[1].request
        assert second.sampling.max_tokens == made.prefills[0].calls[0].request.sampling.max_tokens - 2
        assert second.request_id != made.prefills[0].calls[0].request.request_id


async def test_a_stop_text_is_found_across_the_break(folder: Path) -> None:
    async with house(folder, decodes=2) as made:
        made.knows("x", "okay")
        first_of(made.decodes, lost_with_tokens_out(made))
        status, body = await ask(made, stop=["ka"])
        assert (status, answer_of(body), body["choices"][0]["finish_reason"]) == (200, "o", "stop")
        assert body["usage"]["completion_tokens"] == 3


async def test_a_continuation_waits_for_room(folder: Path) -> None:
    async with house(folder, decodes=2) as made:
        made.knows("x", "okay")
        first_of(made.decodes, lost_with_tokens_out(made))
        good, full = made.prefills[0].script, [fails(Overloaded("send is full", 0.01))]

        def busy_once(request: Any) -> AsyncGenerator[Any, None]:
            return (full.pop() if full and len(request.prompt_token_ids) > 1 else good)(request)

        made.prefills[0].script = busy_once
        assert await ask_stream(made) == ("okay", True, None)
        assert made.prompts(made.prefills) == ["x", "xok", "xok"]


async def test_what_cannot_be_continued_exactly_is_an_error(folder: Path) -> None:
    async with house(folder, decodes=2) as made:
        made.knows("x", "okay")
        first_of(made.decodes, lost_with_tokens_out(made))
        status, body = await ask(made, seed=1)
        assert status == 503
        assert "broke off" in body["error"]["message"]
        assert "seed" in body["error"]["message"]
        assert sum(len(worker.calls) for worker in made.decodes) == 1


async def test_an_answer_that_breaks_off_everywhere_is_an_error_in_the_stream(folder: Path) -> None:
    async with house(folder, decodes=2) as made:
        made.knows("x", "okay" * 4)
        for worker in made.decodes:

            def a_token_each(request: Any) -> AsyncGenerator[Any, None]:
                asked = len(request.prompt_token_ids)
                return rest(made.ids("xokayokay")[asked + 1 : asked + 2], then=LOST)(request)

            worker.script = a_token_each
        text, done, error = await ask_stream(made)
        # Tokens of an attempt that ends before the gateway has passed them on are not given.
        assert "okayok".startswith(text)
        assert not done
        assert error is not None
        assert sum(len(worker.calls) for worker in made.decodes) == ATTEMPTS


@pytest.mark.parametrize("ids", [[], [80]])
async def test_a_decode_that_ends_early_is_no_success(folder: Path, ids: list[int]) -> None:
    async with house(folder) as made:
        made.answers("ok")
        made.decodes[0].script = rest(ids, 0)
        status, body = await ask(made)
        assert status == 503
        assert "ended" in body["error"]["message"]


async def test_a_prefill_that_ends_without_a_token_is_no_success(folder: Path) -> None:
    async with house(folder, decodes=1) as made:

        async def nothing(_: Any) -> AsyncGenerator[Any, None]:
            for _ in ():
                yield

        made.prefills[0].script = made.decodes[0].script = nothing
        status, _ = await ask(made)
        assert status == 503


async def test_colocated_is_tried_once_more_before_a_token_only(folder: Path) -> None:
    async with house(folder, decodes=2) as made:
        good = rest([*made.ids("ok"), EOS])
        for worker in made.decodes:
            worker.script = once(fails(LOST), good)
        made.decodes[1].script = good
        status, body = await ask(made, presence_penalty=1)
        assert (status, answer_of(body)) == (200, "ok")
        for worker in made.decodes:
            worker.calls.clear()
            worker.script = rest(made.ids("o"), then=LOST)
        status, _ = await ask(made, presence_penalty=1)
        # Its penalty counts output tokens, of which another replica would know nothing.
        assert status == 503
        assert sum(len(worker.calls) for worker in made.decodes) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("sampling.json_schema", "cannot be compiled"), 400),
        (KvTooLarge("40 MiB of KV; the pool has 10 MiB"), 400),
        (HexgenError("a bug"), 500),
    ],
)
async def test_what_no_retry_can_mend_is_told_at_once(folder: Path, error: HexgenError, status: int) -> None:
    async with house(folder, prefills=2) as made:
        for worker in made.prefills:
            worker.script = fails(error)
        seen, body = await ask(made)
        assert seen == status
        assert str(error).split(": ")[-1] in body["error"]["message"]
        assert sum(len(worker.calls) for worker in made.prefills) == 1


async def test_calls_to_a_replica_that_the_coordinator_has_lost_are_ended_when_they_are_silent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(folder, decodes=2) as made:
        made.answers("ok")
        for worker in made.decodes:
            worker.script = silent
        asking = asyncio.create_task(ask(made))
        called = [asyncio.create_task(worker.first_call()) for worker in made.decodes]
        done, waiting = await asyncio.wait(called, return_when=asyncio.FIRST_COMPLETED)
        number = called.index(done.pop())
        for task in waiting:
            task.cancel()
        other = made.decodes[1 - number]
        other.script = rest([*made.ids("k"), EOS])
        made.set_states(**{f"decode_{number}": ReplicaState.LOST})
        # It has said something lately: it may be alive all the same.
        assert await made.gateway.plan_changed()
        assert not made.decodes[number].calls[0].over.is_set()
        monkeypatch.setattr("hexgen2.gateway.peers.SILENT_S", 0.0)
        assert not await made.gateway.plan_changed()
        status, body = await asking
        assert (status, answer_of(body)) == (200, "ok")
        assert await made.decodes[number].calls[0].ended()
        # The same transfer, without another prefill.
        assert len(made.prefills[0].calls) == 1


async def test_a_lost_replica_breaks_an_answer_off_and_those_that_speak_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(folder) as made:
        made.answers("ok")
        made.decodes[0].script = rest(made.ids("k"), hold=True)
        asking = asyncio.create_task(ask_stream(made))
        await (await made.prefills[0].first_call()).ended()
        monkeypatch.setattr("hexgen2.gateway.peers.SILENT_S", 0.0)
        assert not await made.gateway.plan_changed()
        assert not asking.done()
        made.set_states(decode_0=ReplicaState.LOST)
        await made.gateway.plan_changed()
        text, whole, error = await asking
        assert ("ok".startswith(text), whole) == (True, False)
        assert error is not None
        assert "the decode replica was lost" in error["message"]
