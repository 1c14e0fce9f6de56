"""More than can be served: full queues, deadlines, nothing ready, stopping; and many requests at once."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from hexgen2.errors import Overloaded
from hexgen2.plan import Plan, ReplicaState
from tests.eventually import eventually
from tests.gateway.asking import BODY, PATH, answer_of, ask, ask_stream
from tests.gateway.house import EOS, fails, first_token, house, rest


async def test_a_full_queue_is_told_with_when_to_come_back(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ok")
        made.prefills[0].script = fails(Overloaded("256 requests wait for memory", retry_after_s=2.5))
        response = await made.http.post(PATH, json=BODY)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert "256 requests" in response.json()["error"]["message"]
        assert len(made.prefills[0].calls) == 1


async def test_a_full_queue_is_left_for_another(folder: Path) -> None:
    async with house(folder, prefills=2) as made:
        made.answers("ok")
        made.prefills[0].script = fails(Overloaded("full"))
        for _ in range(3):
            assert (await ask(made))[0] == 200
        assert len(made.prefills[1].calls) == 3


async def test_the_deadline_ends_every_call(folder: Path) -> None:
    async with house(folder, request_timeout_s=2.0) as made:
        status, body = await ask(made)
        assert status == 504
        assert body["error"]["type"] == "timeout_error"
        for worker in (*made.prefills, *made.decodes):
            assert await worker.calls[0].ended()


async def test_the_deadline_within_a_stream_is_an_error_event(folder: Path) -> None:
    async with house(folder, request_timeout_s=2.0) as made:
        made.answers("ok")
        made.decodes[0].script = rest(made.ids("k"), hold=True)
        text, done, error = await ask_stream(made)
        assert (text, done) == ("ok", False)
        assert error is not None
        assert error["type"] == "timeout_error"


async def test_nothing_ready_is_503_and_health_says_so(folder: Path) -> None:
    async with house(folder) as made:
        made.set_states(prefill_0=ReplicaState.STARTING, decode_0=ReplicaState.STARTING)
        response = await made.http.post(PATH, json=BODY)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert (await made.http.get("/health")).status_code == 503
        made.plans.plan, made.plans.statuses = Plan(0), {}
        assert (await ask(made))[0] == 503
        assert (await made.http.get("/health")).status_code == 503


async def test_more_than_it_takes_at_once_is_503(folder: Path) -> None:
    async with house(folder, max_concurrent_requests=2) as made:
        running = [asyncio.create_task(ask(made)) for _ in range(2)]
        await eventually(lambda: len(made.prefills[0].calls) == 2)
        response = await made.http.post(PATH, json=BODY)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for call in made.prefills[0].calls:
            assert await call.ended()
        made.answers("ok")
        assert (await ask(made))[0] == 200


async def test_a_stopping_gateway_finishes_what_runs_and_takes_no_more(folder: Path) -> None:
    async with house(folder) as made:
        made.answers("ok")
        go = asyncio.Event()
        answer = made.decodes[0].script

        async def later(request: Any) -> AsyncGenerator[Any, None]:
            await go.wait()
            async for response in answer(request):
                yield response

        made.decodes[0].script = later
        running = asyncio.create_task(ask(made))
        await made.decodes[0].called.wait()
        draining = asyncio.create_task(made.gateway.drain(10))
        await asyncio.sleep(0)
        assert (await ask(made))[0] == 503
        assert (await made.http.get("/health")).status_code == 503
        go.set()
        status, body = await running
        assert (status, answer_of(body)) == (200, "ok")
        assert await draining


async def test_many_at_once_do_not_mix(folder: Path) -> None:
    async with house(folder, prefills=2, decodes=2) as made:

        async def echo_first(request: Any) -> AsyncGenerator[Any, None]:
            async for response in first_token(request.prompt_token_ids[0])(request):
                await asyncio.sleep(0)
                yield response

        async def echo_rest(request: Any) -> AsyncGenerator[Any, None]:
            async for response in rest([*request.prompt_token_ids[1:], EOS])(request):
                await asyncio.sleep(0)
                yield response

        for worker in made.prefills:
            worker.script = echo_first
        for worker in made.decodes:
            worker.script = echo_rest
        prompts = [f"prompt {number:03}" for number in range(60)]
        answers = await asyncio.gather(*(ask(made, prompt=prompt) for prompt in prompts))
        assert [answer_of(body) for _, body in answers] == prompts
        assert all(len(worker.calls) == 30 for worker in made.prefills)
