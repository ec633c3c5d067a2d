"""Limits on the size and the duration of request bodies."""

import asyncio

from unimoe_model.serve.limits import Limits
from unimoe_model.serve.security import error_body, send_error

DRAINED = 4 * 2**30
"""Bytes of a refused body that are read and discarded: a client that sends its whole body before
reading then receives the error response."""


class BodyLimit:
    """ASGI middleware that refuses bodies that are too large or too slow, without buffering them.

    Args:
        app: the protected application.
        limits: `body_bytes` and `body_seconds` are used.
    """

    def __init__(self, app, limits: Limits):
        self._app = app
        self._limits = limits

    async def __call__(self, scope, receive, send):
        """Responds to a refused request with an error, and passes others to the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._limits)
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and lengths[0].isdigit() and int(lengths[0]) > self._limits.body_bytes:
            await self._refuse(body, send, 413)
            return
        has_started = False

        async def guarded(message):
            nonlocal has_started
            if body.refused and not has_started:
                return
            has_started = True
            await send(message)

        try:
            await self._app(scope, body.receive, guarded)
        except Exception:
            # The application saw a body that ended early; its own error is not the cause.
            if not body.refused:
                raise
        if body.refused and not has_started:
            await self._refuse(body, send, body.refused)

    async def _refuse(self, body: "_Body", send, status: int) -> None:
        if status == 413:
            message = f"body must have at most {self._limits.body_bytes:,} bytes"
        else:
            message = f"body must be here within {self._limits.body_seconds:g} s"
        sent = []

        async def hold(message):
            sent.append(message)

        refusal = error_body(message, "invalid_request_error")
        await send_error(hold, status, refusal, [(b"connection", b"close")])
        # All of it is sent at once, but the response ends when the client has sent its body: a
        # connection that is closed before loses the response as well.
        start, content = sent
        await send(start)
        await send(content | {"more_body": True})
        if status == 413:
            await body.drain()
        await send({"type": "http.response.body"})


class _Body:
    def __init__(self, receive, limits: Limits):
        self._receive = receive
        self._limits = limits
        self._bytes = 0
        self._is_whole = False
        self._deadline = asyncio.get_running_loop().time() + limits.body_seconds
        self.refused = 0

    async def receive(self):
        """Same as the server's `receive`, but returns a disconnect once the body is refused."""
        if self._is_whole:
            return await self._receive()
        if self.refused:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refused = 408
            return {"type": "http.disconnect"}
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._bytes > self._limits.body_bytes:
                self.refused = 413
                return {"type": "http.disconnect"}
        return message

    async def drain(self) -> None:
        """Reads and discards the rest of the body."""
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while not self._is_whole and self._bytes < DRAINED:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        return
                    self._bytes += len(message.get("body", b""))
                    self._is_whole = not message.get("more_body", False)
        except TimeoutError:
            return
