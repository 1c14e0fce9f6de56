"""The official client, as it comes."""

from pathlib import Path

import openai
import pytest

from hexgen2.errors import Overloaded, Unavailable
from tests.gateway.house import MODEL, House, fails, house, rest

MESSAGES = [openai.types.chat.ChatCompletionUserMessageParam(role="user", content="hi")]


def client(made: House) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{made.http_address}/v1", api_key="any", max_retries=0, timeout=30)


async def test_chat_completion_and_models(folder: Path) -> None:
    async with house(folder) as made, client(made) as api:
        made.answers("Paris.")
        (model,) = (await api.models.list()).data
        answer = await api.chat.completions.create(model=model.id, messages=MESSAGES, seed=1, user="me")
        assert answer.choices[0].message.content == "Paris."
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7
        text = await api.completions.create(model=MODEL, prompt="x", logprobs=1)
        assert text.choices[0].text == "Paris."


async def test_stream_with_usage(folder: Path) -> None:
    async with house(folder) as made, client(made) as api:
        made.answers("Paris.")
        stream = await api.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Paris."
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 7


async def test_the_accumulating_helper(folder: Path) -> None:
    async with house(folder) as made, client(made) as api:
        made.answers("Paris.")
        async with api.chat.completions.stream(model=MODEL, messages=MESSAGES, logprobs=True) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "Paris."
        assert final.choices[0].finish_reason == "stop"


async def test_errors_are_its_own_classes(folder: Path) -> None:
    async with house(folder) as made, client(made) as api:
        with pytest.raises(openai.NotFoundError):
            await api.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as caught:
            await api.chat.completions.create(model=MODEL, messages=MESSAGES, n=2)
        assert caught.value.param == "n"
        made.prefills[0].script = fails(Overloaded("full"))
        with pytest.raises(openai.InternalServerError) as overloaded:
            await api.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert overloaded.value.status_code == 503


async def test_an_error_within_a_stream_is_raised(folder: Path) -> None:
    async with house(folder) as made, client(made) as api:
        made.answers("Paris.")
        made.decodes[0].script = rest(made.ids("aris"), then=Unavailable("gone"))
        with pytest.raises(openai.APIError, match="gone"):
            async for _ in await api.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
                pass
