"""A client of the gateway: asks, leaves when it was told to, and compares every token with the right one."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
import httpx

from benchmarks.chaos.asks import Api, Ask, Kind
from benchmarks.chaos.oracle import text_of, wrong_end, wrong_tokens
from benchmarks.chaos.outcome import End, Outcome
from hexgen2.engine.base import FinishReason
from hexgen2.rpc.client import channel
from hexgen2.text.tokenizer import TextModel
from hexgen2.v1 import gateway_pb2, gateway_pb2_grpc, types_pb2

#: Presence penalties make a request depend on its history; emulated engines ignore them otherwise.
_PENALTY = 0.5
_FINISH = {
    types_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    types_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}
#: HTTP statuses that stand for a gRPC one.
_HTTP = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED", 500: "INTERNAL"}


class _Failed(Exception):
    """The gateway, or the way to it, ended the request with an error."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _Left(Exception):
    """The client has seen as many tokens as it wanted."""

    def __init__(self) -> None:
        self.at_ns = time.time_ns()


class _Seen:
    """What has come of one answer."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.tokens: list[int] = []
        self.text = ""
        self.num_chunks = 0
        self.finish: FinishReason | None = None
        self.unlike = ""

    def more(self) -> None:
        """After each part: whether the client leaves now."""
        leave = self.ask.cancel_after_tokens
        if leave is not None and max(len(self.tokens), self.num_chunks) >= leave and self.finish is None:
            raise _Left


class Client:
    """Of one gateway. ``limit_s`` is the gateway's own deadline, for requests that bring none.

    ``grace_s``: how much later than its deadline an answer may come, since the client shares its cores with the fleet.
    """

    def __init__(self, grpc_address: str, http_address: str, text: TextModel, limit_s: float, grace_s: float) -> None:
        self._channel = channel(grpc_address)
        self._http = httpx.AsyncClient(
            base_url=f"http://{http_address}",
            timeout=httpx.Timeout(None, connect=limit_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )
        self._text = text
        self._limit_s = limit_s
        self._grace_s = grace_s

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()
        await self._channel.close()

    async def ask(self, ask: Ask) -> Outcome:
        """Ask and follow to the end."""
        trace_id = secrets.token_hex(16)
        seen = _Seen(ask)
        parts = self._grpc(ask, seen, trace_id) if ask.api is Api.GRPC else self._sse(ask, seen, trace_id)
        began_ns = time.time_ns()
        given_up_ns = None
        end, status, detail = End.ANSWERED, "OK", ""
        wait_s = min(ask.timeout_s or self._limit_s, self._limit_s) + self._grace_s
        leaves = ask.cancel_after_s is not None and ask.cancel_after_s < wait_s
        try:
            try:
                async with asyncio.timeout(ask.cancel_after_s if leaves else wait_s), aclosing(parts):
                    async for _ in parts:
                        seen.more()
            except (TimeoutError, _Left) as reason:
                # The call was cancelled while the exception passed through it.
                end, status = (End.CANCELLED, "CANCELLED") if leaves else (End.SILENT, "none")
                if isinstance(reason, _Left):
                    end, status, given_up_ns = End.CANCELLED, "CANCELLED", reason.at_ns
                elif ask.cancel_after_s is not None:
                    given_up_ns = began_ns + int(ask.cancel_after_s * 1e9)
        except _Failed as error:
            status, detail = error.status, str(error)[:300]
            end = End.BROKEN_OFF if seen.tokens or seen.num_chunks else End.REFUSED
            if status == "DEADLINE_EXCEEDED":
                end = End.DEADLINE
                given_up_ns = began_ns + int((ask.timeout_s or self._limit_s) * 1e9)
        return Outcome(
            ask.number,
            ask.kind,
            ask.api,
            trace_id,
            began_ns,
            time.time_ns(),
            end,
            status,
            len(seen.tokens) or seen.num_chunks,
            self._wrong(ask, seen, end),
            detail,
            given_up_ns,
        )

    def _wrong(self, ask: Ask, seen: _Seen, end: End) -> str:
        whole = end is End.ANSWERED
        if ask.api is Api.GRPC:
            if wrong := seen.unlike or wrong_tokens(ask.known, seen.tokens):
                return wrong
            return wrong_end(ask.known, seen.tokens, ask.max_tokens, ask.stop_token, seen.finish) if whole else ""
        answer = ask.known.answer[: ask.max_tokens]
        if whole:
            # One chunk, or one entry of the usage, per token; the stop token ends the answer and is no part of it.
            stopped = ask.stop_token in answer
            shown = answer[: answer.index(ask.stop_token)] if stopped and ask.stop_token is not None else answer
            right = text_of(self._text, ask.known.prompt, shown, whole=True)
            if seen.text != right:
                return f"text {seen.text!r}, not {right!r}"
            finish = FinishReason.STOP if stopped else FinishReason.LENGTH
            return "" if seen.finish is finish else f"finished by {seen.finish}, not {finish}"
        right = text_of(self._text, ask.known.prompt, answer, whole=True)
        return "" if right.startswith(seen.text) else f"text {seen.text!r} does not begin {right!r}"

    async def _grpc(self, ask: Ask, seen: _Seen, trace_id: str) -> AsyncGenerator[None]:
        request = gateway_pb2.GenerateRequest(
            sampling=types_pb2.SamplingParams(
                max_tokens=ask.max_tokens,
                temperature=0.0,
                ignore_eos=True,
                stop_token_ids=() if ask.stop_token is None else (ask.stop_token,),
                seed=ask.seed,
                logprobs=ask.logprobs,
                presence_penalty=_PENALTY if ask.kind is Kind.HISTORY else 0.0,
            )
        )
        request.prompt_token_ids.ids.extend(ask.known.prompt)
        stub = gateway_pb2_grpc.GatewayStub(self._channel)
        metadata = (("traceparent", _traceparent(trace_id)),)
        call: Any = stub.Generate(request, timeout=ask.timeout_s, metadata=metadata)
        try:
            async for response in call:
                seen.tokens += [token.token_id for token in response.tokens]
                if ask.logprobs is not None and not all(token.HasField("logprob") for token in response.tokens):
                    seen.unlike = "a token without its logprob"
                seen.finish = _FINISH.get(response.finish_reason, seen.finish)
                yield
        except grpc.aio.AioRpcError as error:
            raise _Failed(error.code().name, error.details() or "") from None
        finally:
            call.cancel()

    async def _sse(self, ask: Ask, seen: _Seen, trace_id: str) -> AsyncGenerator[None]:
        body: dict[str, Any] = {
            "model": "chaos",
            "prompt": list(ask.known.prompt),
            "max_tokens": ask.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stop_token_ids": [] if ask.stop_token is None else [ask.stop_token],
            "presence_penalty": _PENALTY if ask.kind is Kind.HISTORY else 0.0,
            "stream": ask.api is Api.SSE,
        }
        body |= {"seed": ask.seed} if ask.seed is not None else {}
        body |= {"logprobs": ask.logprobs} if ask.logprobs is not None else {}
        headers = {"traceparent": _traceparent(trace_id)}
        try:
            async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise _Failed(_HTTP.get(response.status_code, str(response.status_code)), text)
                if ask.api is Api.HTTP:
                    self._take(json.loads(await response.aread()), seen)
                    yield
                    return
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        self._take(json.loads(line.removeprefix("data: ")), seen)
                        yield
                raise _Failed("SHORT", "the stream ended without [DONE] and without an error")
        except httpx.HTTPError as error:
            raise _Failed("UNAVAILABLE", f"connection: {error!r}") from None

    def _take(self, event: dict[str, Any], seen: _Seen) -> None:
        if "error" in event:
            kind = event["error"].get("type")
            status = {"timeout_error": "DEADLINE_EXCEEDED", "service_unavailable_error": "UNAVAILABLE"}.get(kind)
            raise _Failed(status or "INTERNAL", str(event["error"].get("message")))
        for choice in event["choices"]:
            seen.text += choice["text"]
            seen.num_chunks += 1
            if choice["finish_reason"]:
                seen.finish = FinishReason(choice["finish_reason"])


def _traceparent(trace_id: str) -> str:
    return f"00-{trace_id}-{secrets.token_hex(8)}-01"
