"""Access control of a server: its host names, and a token if other machines can reach it."""

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

COOKIE = "unimoe_token"


def is_loopback(host: str) -> bool:
    """Returns whether an address is reachable only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_for(host: str, token: str | None) -> str | None:
    """The token that requests need: a random one where none, or an empty one, is given.

    Args:
        host: address to listen on; on a loopback address no token is required.
        token: the token that was given.
    """
    if token or is_loopback(host):
        return token or None
    return secrets.token_urlsafe(24)


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict:
    """Returns an error in the format of OpenAI clients."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def send_error(send, status: int, body: dict, headers: Collection[tuple] = ()) -> None:
    """Sends an error as the whole response."""
    content = json.dumps(body).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    start = {"type": "http.response.start", "status": status, "headers": [*fixed, *headers]}
    await send(start)
    await send({"type": "http.response.body", "body": content})


class Gate:
    """ASGI middleware that checks the Host, the Origin and the token of requests.

    A page of another site can make a browser send requests to this server, and a host name owned by
    that site can resolve to this address (DNS rebinding); both are refused. An IP address as Host
    is always accepted: it has no name that could be rebound.

    Args:
        app: the protected application.
        names: host names of the server besides `localhost`.
        token: token required in `Authorization: Bearer`, the cookie or `?token=`, which sets the
            cookie; None if none is required.
    """

    def __init__(self, app, names: Collection[str] = (), token: str | None = None):
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}
        self._token = token
        self._cookie = hashlib.sha256(token.encode()).hexdigest() if token else ""

    async def __call__(self, scope, receive, send):
        """Responds to a refused request with an error, and passes others to the application."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value.decode("latin-1"))
        refused = self._refusal(scope, headers)
        if refused is None and self._token and scope["path"] != "/health":
            query = parse_qs(scope["query_string"].decode("latin-1"))
            given = query.get("token", [""])[0]
            if scope["type"] == "http" and scope["method"] == "GET" and self._is_token(given):
                await self._enter(scope, send)
                return
            if not self._is_known(headers):
                refused = (
                    401,
                    "token is missing or wrong: open the address that the server printed,"
                    " or send Authorization: Bearer TOKEN",
                )
        if refused is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, message = refused
            await send_error(send, status, error_body(message, "invalid_request_error"))

    def _refusal(self, scope, headers: dict[bytes, list[str]]) -> tuple[int, str] | None:
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return 421, (
                f"Host ({', '.join(hosts)[:200]}) must be a name of this server; --allow-host NAME"
                " adds one"
            )
        origins = headers.get(b"origin", [])
        if origins and urlsplit(origins[0]).netloc.lower() != hosts[0].lower():
            return 403, f"Origin ({origins[0][:200]}) must be this server"
        return None

    def _is_own(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _is_known(self, headers: dict[bytes, list[str]]) -> bool:
        for value in headers.get(b"authorization", []):
            scheme, _, given = value.partition(" ")
            if scheme.lower() == "bearer" and self._is_token(given.strip()):
                return True
        for value in headers.get(b"cookie", []):
            try:
                cookie = SimpleCookie(value).get(COOKIE)
            except CookieError:
                continue
            if cookie and hmac.compare_digest(cookie.value.encode(), self._cookie.encode()):
                return True
        return False

    async def _enter(self, scope, send) -> None:
        """Sets the cookie and redirects to the URL without the token, which is then not leaked."""
        headers = [
            (b"location", (scope.get("root_path", "") + scope["path"]).encode()),
            (
                b"set-cookie",
                f"{COOKIE}={self._cookie}; HttpOnly; SameSite=Strict; Path=/".encode(),
            ),
            (b"content-length", b"0"),
        ]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body"})
