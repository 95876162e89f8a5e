"""Who may talk to the studio: whoever has the token, and pages of the studio itself alone."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAME = "token"
# The page loads nothing from elsewhere, and says so to the browser.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "font-src 'self' data:; worker-src 'self' blob:; media-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI application around another one, which answers nothing that it should not.

    * A token, if there is one, must be in the address (then it becomes a cookie) or in the cookie.
    * On loopback the `Host` must be a name of this machine: else a page of another site, whose name
      was made to point here (DNS rebinding), could read what the studio answers.
    * Requests that a browser sends for another site's page are refused; links to the studio work.

    Args:
        app: what is guarded.
        host: that the studio listens on.
        token: None to ask for none.
        cookie: its name; others of the machine's ports have the same cookies.
    """

    def __init__(self, app: App, host: str, token: str | None, cookie: str = "studio") -> None:
        self._app, self._local, self._token, self._cookie = app, is_loopback(host), token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)  # its start and its end
            return
        headers = {key.decode("latin-1"): v.decode("latin-1") for key, v in scope["headers"]}
        refused = self._refusal(scope, headers)
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        given = dict(query).get(_NAME)
        if refused is not None:
            await _answer(scope, send, 403, refused)
        elif self._token is None or self._known(headers):
            await self._app(scope, receive, _with_headers(send))
        elif given is not None and secrets.compare_digest(given.encode(), self._token.encode()):
            await self._enter(scope, send, query)
        else:
            text = "Open the address that the studio printed: it ends in ?token=...\n"
            await _answer(scope, send, 401, text)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> str | None:
        """Why a request is refused, whoever it is from."""
        host = headers.get("host", "")
        if self._local and not is_loopback(_name(host)):
            return "This studio answers to names of this machine only.\n"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return "This request is from the page of another site.\n"
        site = headers.get("sec-fetch-site", "none")
        opened = scope.get("method") == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("none", "same-origin") and not opened:
            return "This request is from the page of another site.\n"
        return None

    def _known(self, headers: dict[str, str]) -> bool:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return False
        assert self._token is not None
        return found is not None and secrets.compare_digest(
            found.value.encode(), self._token.encode()
        )

    async def _enter(self, scope: Scope, send: Send, query: list[tuple[str, str]]) -> None:
        """To the same page, with the token as a cookie instead of in the address."""
        rest = urlencode([(name, value) for name, value in query if name != _NAME])
        target = scope["path"].lstrip("/")
        cookie = f"{self._cookie}={self._token}; HttpOnly; SameSite=Lax; Path=/"
        more = {"location": f"/{target}{'?' if rest else ''}{rest}", "set-cookie": cookie}
        await _answer(scope, send, 303, "", more)


def _name(host: str) -> str:
    """The name in a `Host` header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _with_headers(send: Send) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            named = {key.lower() for key, _ in message.get("headers", [])}
            more = [(k.encode(), v.encode()) for k, v in _HEADERS.items()]
            own = [pair for pair in more if pair[0] not in named]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return sent


async def _answer(
    scope: Scope, send: Send, status: int, text: str, more: dict[str, str] | None = None
) -> None:
    """A line of text; a websocket is closed."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store"}
    pairs = [(k.encode(), v.encode()) for k, v in {**headers, **_HEADERS, **(more or {})}.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": text.encode()})
