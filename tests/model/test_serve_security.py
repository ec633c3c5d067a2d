"""Who is let through: Host, Origin and token; and bodies that are too large or too slow."""

import asyncio
import json

import pytest

from unimoe_model.serve.body_limit import BodyLimit
from unimoe_model.serve.limits import Limits
from unimoe_model.serve.security import Gate, is_loopback, token_for


async def plain(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def call(app, *headers, path="/", query="", method="GET", messages=None):
    """Status, headers and body of a response."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }
    given = iter(messages or [{"type": "http.request"}])
    sent = []

    async def receive():
        return next(given)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:7860", "localhost:80", "[::1]:7860", "10.0.0.7", "LOCALHOST", "a.b:1"],
)
def test_own_names_and_addresses_are_let_through(host):
    assert call(Gate(plain, ["A.b"]), ("host", host))[0] == 200


@pytest.mark.parametrize(
    "hosts",
    [["evil.example"], ["localhost.evil.example:7860"], ["evil.example:127"], [""], [], ["a", "a"]],
)
def test_other_hosts_are_refused_by_name(hosts):
    status, _, body = call(Gate(plain), *(("host", host) for host in hosts))
    assert status == 421
    assert (
        f"Host ({', '.join(hosts)}) must be a name of this server"
        in json.loads(body)["error"]["message"]
    )


def test_pages_of_other_sites_are_refused():
    host = ("host", "localhost:7860")
    assert call(Gate(plain), host, ("origin", "http://localhost:7860"))[0] == 200
    for origin in ("http://evil.example", "http://localhost:81", "null"):
        assert call(Gate(plain), host, ("origin", origin))[0] == 403


def test_other_machines_need_a_token_also_where_it_is_given_empty():
    assert token_for("0.0.0.0", "s3cret") == token_for("127.0.0.1", "s3cret") == "s3cret"
    assert token_for("127.0.0.1", None) is token_for("127.0.0.1", "") is None
    made = [token_for("0.0.0.0", given) for given in (None, "", None)]
    assert len(set(made)) == 3
    assert min(map(len, made)) > 20


def test_a_token_is_asked_for_and_kept_in_a_cookie():
    gate, host = Gate(plain, token="s3cret"), ("host", "localhost")
    status, _, body = call(gate, host)
    assert status == 401
    assert "token is missing or wrong" in json.loads(body)["error"]["message"]
    assert call(gate, host, ("authorization", "Bearer s3cre"))[0] == 401
    assert call(gate, host, ("authorization", "Bearer s3cret"))[0] == 200
    assert call(gate, host, path="/health")[0] == 200
    assert call(gate, host, query="token=wrong")[0] == 401
    status, headers, _ = call(gate, host, query="token=s3cret")
    assert (status, headers["location"]) == (303, "/")
    cookie, *flags = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict"} <= set(flags)
    assert "s3cret" not in cookie
    assert call(gate, host, ("cookie", f"other=1; {cookie}"))[0] == 200
    assert call(gate, host, ("cookie", f"{cookie}0"))[0] == 401
    assert call(gate, host, query="token=s3cret", method="POST")[0] == 401


def test_loopback_addresses():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [
        True
    ] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "::", "example.org")] == [
        False
    ] * 4


def body_of(sizes):
    last = len(sizes) - 1
    for index, size in enumerate(sizes):
        yield {"type": "http.request", "body": bytes(size), "more_body": index < last}


@pytest.mark.parametrize("length", [[], [("content-length", "101")]])
def test_a_body_beyond_the_limit_is_read_to_its_end_and_refused(length):
    messages = body_of([60, 41, 1000])
    status, headers, body = call(
        BodyLimit(plain, Limits(body_bytes=100)), *length, messages=messages
    )
    assert (status, headers["connection"]) == (413, "close")
    assert json.loads(body)["error"]["message"] == "body must have at most 100 bytes"
    assert next(messages, None) is None


def test_a_body_at_the_limit_is_taken():
    assert call(BodyLimit(plain, Limits(body_bytes=100)), messages=body_of([60, 40]))[0] == 200


def test_a_body_that_does_not_come_is_refused():
    async def run():
        sent = []

        async def never():
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        limit = BodyLimit(plain, Limits(body_seconds=0.01))
        await limit({"type": "http", "headers": []}, never, send)
        return sent

    start, content, _ = asyncio.run(run())
    assert start["status"] == 408
    assert json.loads(content["body"])["error"]["message"] == "body must be here within 0.01 s"
