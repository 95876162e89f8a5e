"""Who may talk to the studio."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tessera.errors import TesseraError
from tessera.studio.guard import Guard, is_loopback
from tessera.studio.serve import Address, checked_token

TOKEN = "correct-horse"
HERE = {"host": "127.0.0.1:7860"}


async def _page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"secret"})


def ask(
    token: str | None, headers: dict[str, str], query: str = "", host: str = "127.0.0.1",
    kind: str = "http", method: str = "GET", path: str = "/x",
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    """Status, headers and body of an answer."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    scope = {
        "type": kind, "method": method, "path": path, "query_string": query.encode(),
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    asyncio.run(Guard(_page, host, token)(scope, receive, send))
    if sent[0]["type"] == "websocket.close":
        return sent[0]["code"], {}, b""
    named = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], named, b"".join(m.get("body", b"") for m in sent)


def test_on_this_machine_nothing_is_asked_for() -> None:
    status, headers, body = ask(None, HERE)
    assert (status, body) == (200, b"secret")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert ask(None, {"host": "localhost:1"})[0] == 200
    assert ask(None, {"host": "[::1]:7860"}, host="::1")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example:7860", "evil.example", "", "127.0.0.1.evil.example"]
)
def test_other_names_for_this_machine_are_refused(host: str) -> None:
    status, _, body = ask(None, {"host": host})
    assert (status, b"secret" in body) == (403, False)


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({"origin": "http://127.0.0.1:7860"}, "POST", 200),
        ({"origin": "http://evil.example"}, "POST", 403),
        ({"origin": "http://127.0.0.1:3000"}, "POST", 403),
        ({"origin": "null"}, "POST", 403),
        ({"sec-fetch-site": "same-origin"}, "POST", 200),
        ({"sec-fetch-site": "cross-site"}, "GET", 403),
        ({"sec-fetch-site": "same-site"}, "GET", 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, "GET", 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, "POST", 403),
    ],
)
def test_pages_of_other_sites_are_refused(
    headers: dict[str, str], method: str, status: int
) -> None:
    assert ask(None, {**HERE, **headers}, method=method)[0] == status


def test_a_token_is_asked_for_and_kept_as_a_cookie() -> None:
    anywhere = {"host": "10.0.0.5:7860"}
    for headers, query in (
        (anywhere, ""),
        (anywhere, "token=wrong-horse"),
        (anywhere, "token=%C3%A4"),
        ({**anywhere, "cookie": "studio=wrong"}, ""),
        ({**anywhere, "cookie": "other=correct-horse"}, ""),
        ({**anywhere, "cookie": "studio=\xe4;;=,"}, ""),
    ):
        status, _, body = ask(TOKEN, headers, query, host="0.0.0.0")
        assert (status, b"secret" in body) == (401, False)
    status, headers, body = ask(
        TOKEN, anywhere, f"a=1&token={TOKEN}", host="0.0.0.0", path="//evil"
    )
    assert (status, headers["location"], body) == (303, "/evil?a=1", b"")
    assert headers["set-cookie"] == f"studio={TOKEN}; HttpOnly; SameSite=Lax; Path=/"
    kept = {**anywhere, "cookie": f"a=b; studio={TOKEN}"}
    assert ask(TOKEN, kept, host="0.0.0.0")[::2] == (200, b"secret")


def test_a_websocket_is_closed() -> None:
    assert ask(TOKEN, HERE, kind="websocket")[0] == 1008


def test_which_addresses_are_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "")))


def test_tokens() -> None:
    assert checked_token("127.0.0.1", None) is None
    assert checked_token("127.0.0.1", TOKEN) == TOKEN
    made = checked_token("0.0.0.0", None)
    assert made is not None
    assert len(made) >= 32
    assert made != checked_token("0.0.0.0", None)
    for bad in ("short", "", "with space and more", "semi;colon;"):
        with pytest.raises(TesseraError, match="at least 8 letters"):
            checked_token("127.0.0.1", bad)


def test_addresses() -> None:
    assert Address("127.0.0.1", 1, None).url == "http://127.0.0.1:1/"
    assert Address("::1", 1, TOKEN).url == f"http://[::1]:1/?token={TOKEN}"
    assert "0.0.0.0" not in Address("0.0.0.0", 1, TOKEN).url
