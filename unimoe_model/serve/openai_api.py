"""The OpenAI chat API over HTTP."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import asdict

from unimoe_model.chat.conversation import ContextFullError
from unimoe_model.extras import needed_by
from unimoe_model.serve.openai_request import ChatRequest, RequestError, parse_request
from unimoe_model.serve.replies import Attached, Ended, Event, Piece, Replies
from unimoe_model.serve.reply_queue import Place, QueueFullError, Ticket
from unimoe_model.serve.security import error_body
from unimoe_model.user_errors import USER_ERRORS

with needed_by("serving", "serve"):
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

_REASONS = {"end": "stop", "stopped": "stop", "length": "length", "context": "length"}
_REASONS["time"] = "length"
_SSE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ChatApi:
    """The routes of the API.

    Args:
        replies: generates the replies.
        name: name of the model.
    """

    def __init__(self, replies: Replies, name: str):
        self._replies = replies
        self._name = name
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Returns all routes."""
        return [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]

    async def health(self, request: Request) -> Response:
        """Returns that the server is up, and the number of requests it has."""
        queue = self._replies.queue
        return JSONResponse({"status": "ok", "queue": len(queue), "model": self._name})

    async def metrics(self, request: Request) -> Response:
        """Returns the metrics for Prometheus."""
        return PlainTextResponse(
            self._replies.metrics.text(), media_type="text/plain; version=0.0.4"
        )

    async def models(self, request: Request) -> Response:
        """Returns the list of models, which has one element."""
        model = {"id": self._name, "object": "model", "owned_by": "unimoe"}
        return JSONResponse({"object": "list", "data": [model | {"created": self._created}]})

    async def complete(self, request: Request) -> Response:
        """Replies to a conversation."""
        try:
            ticket = self._replies.queue.admit()
        except QueueFullError as error:
            self._replies.metrics.ended("full")
            headers = {"Retry-After": str(error.retry_after)}
            return JSONResponse(error_body(str(error), "server_error"), 503, headers)
        is_ours = True
        try:
            # Not `request.body()`, which keeps a copy until the reply is finished.
            body = b"".join([chunk async for chunk in request.stream()])
            asked = await asyncio.to_thread(self._parse, body)
            del body
            completion = _Completion(self._replies, ticket, asked, self._name)
            response = await _while_connected(request, completion.respond())
            is_ours = not isinstance(response, StreamingResponse)
            return response
        except (*USER_ERRORS, TypeError) as error:
            status, body = _refusal(error)
            if isinstance(error, RequestError):
                self._replies.metrics.ended("refused")
            return JSONResponse(body, status)
        finally:
            if is_ours:
                ticket.leave()

    def _parse(self, body: bytes) -> ChatRequest:
        replies = self._replies
        asked = parse_request(body, replies.limits.items, replies.sampling)
        if asked.model != self._name:
            raise RequestError(f"model ({asked.model[:80]}) must be {self._name}", "model")
        return asked


async def _while_connected(request: Request, responding) -> Response:
    """Awaits a response, and cancels it if the client disconnects."""
    task = asyncio.ensure_future(responding)

    async def gone():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


class _Completion:
    def __init__(self, replies: Replies, ticket: Ticket, asked: ChatRequest, name: str):
        self._asked = asked
        self._replies = replies
        self._ticket = ticket
        self._media: list[str] = []
        self._fixed = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }

    async def respond(self) -> Response:
        """Returns the response.

        A stream starts with its first event, so that an error before it has a status code. If the
        request has to wait, the stream starts at once, with comments that give its place in the
        queue.
        """
        asked = self._asked
        self._replies.require_length([asked.system or ""])
        conversation = self._replies.conversation(
            asked.system, asked.max_new_tokens, asked.sampling
        )
        events = self._replies.reply(self._ticket, conversation, asked.message, asked.earlier)
        if not asked.stream:
            async with aclosing(events):
                return await self._whole(events)
        try:
            first = await anext(events)
            while isinstance(first, Attached):
                self._media.append(first.description)
                first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return StreamingResponse(
            self._stream(first, events), media_type="text/event-stream", headers=_SSE
        )

    async def _whole(self, events: AsyncIterator[Event]) -> Response:
        text = ""
        async for event in events:
            if isinstance(event, Attached):
                self._media.append(event.description)
            elif isinstance(event, Piece):
                text += event.text
            elif isinstance(event, Ended):
                ended = event
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = _REASONS[ended.how]
        return JSONResponse(
            {
                **self._fixed,
                "object": "chat.completion",
                "choices": [choice],
                "usage": _usage(ended),
                "unimoe": self._about(ended),
            }
        )

    async def _stream(self, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        try:
            async with aclosing(events):
                if isinstance(first, Place):
                    yield _waiting(first)
                yield self._chunk({"role": "assistant", "content": ""})
                if isinstance(first, Piece):
                    yield self._chunk({"content": first.text})
                if isinstance(first, Ended):
                    yield self._last(first)
                async for event in events:
                    if isinstance(event, Place):
                        yield _waiting(event)
                    elif isinstance(event, Attached):
                        self._media.append(event.description)
                    elif isinstance(event, Piece):
                        yield self._chunk({"content": event.text})
                    else:
                        yield self._last(event)
            yield "data: [DONE]\n\n"
        except USER_ERRORS as error:
            yield f"data: {json.dumps(_refusal(error)[1])}\n\n"
        finally:
            self._ticket.leave()

    def _chunk(self, delta: dict, reason: str | None = None, **more) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._fixed, "object": "chat.completion.chunk", "choices": [choice], **more}
        return f"data: {json.dumps(chunk)}\n\n"

    def _last(self, ended: Ended) -> str:
        last = self._chunk({}, _REASONS[ended.how], unimoe=self._about(ended))
        if self._asked.include_usage:
            chunk = {**self._fixed, "object": "chat.completion.chunk", "choices": []}
            last += f"data: {json.dumps(chunk | {'usage': _usage(ended)})}\n\n"
        return last

    def _about(self, ended: Ended) -> dict:
        routing = None if ended.routing is None else asdict(ended.routing)
        return {"ending": ended.how, "media": self._media, "routing": routing}


def _usage(ended: Ended) -> dict:
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.reply_tokens,
        "total_tokens": ended.prompt_tokens + ended.reply_tokens,
    }


def _waiting(place: Place) -> str:
    """Returns a comment with the place in the queue, which clients ignore."""
    return f": {place.before} before this one, about {place.seconds:.0f} s\n\n"


def _refusal(error: Exception) -> tuple[int, dict]:
    text = " ".join(str(error).split())
    if isinstance(error, ContextFullError):
        return 400, error_body(text, "invalid_request_error", "context_length_exceeded", "messages")
    if isinstance(error, RequestError):
        status = 404 if error.param == "model" else 400
        return status, error_body(text, "invalid_request_error", param=error.param)
    if isinstance(error, ValueError):
        return 400, error_body(text, "invalid_request_error")
    return 500, error_body(text, "server_error")
