"""Cross-origin requests: which web pages may call the gateway from a browser. Pure ASGI."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXPOSED = b"x-request-id, retry-after"  # what a page's script may read of an answer
METHODS = b"GET, POST"
REMEMBER_SECONDS = b"600"  # how long a browser asks no second time

Headers = list[tuple[bytes, bytes]]


def origins_of(text: str) -> tuple[str, ...]:
    """The origins of the setting MOECULE_CORS_ORIGINS."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Cors:
    """Answers a browser's question whether it may ask (the preflight), and tells it that the page may read the answer.

    A page of another origin than these gets the same answers without these headers, so that its browser keeps them from
    it. There are no cookies, so credentials are never allowed.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = dict(scope["headers"]) if self._origins and scope["type"] == "http" else {}
        allowed = self._allowed(asked.get(b"origin", b""))
        if not allowed:
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS" and b"access-control-request-method" in asked:
            headers = _preflight(allowed, asked.get(b"access-control-request-headers", b""))
            await send({"type": "http.response.start", "status": 204, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
        else:
            await self._app(scope, receive, _opened(send, [*allowed, (b"access-control-expose-headers", EXPOSED)]))

    def _allowed(self, origin: bytes) -> Headers:
        """The headers that open an answer to this origin; none: it may not read it."""
        if origin and b"*" in self._origins:
            return [(b"access-control-allow-origin", b"*")]
        if origin in self._origins:
            # Caches must not give one origin's answer to another.
            return [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
        return []


def _preflight(allowed: Headers, wanted: bytes) -> Headers:
    """Every header may be sent; they are named because `*` does not cover `authorization`."""
    headers = [*allowed, (b"access-control-allow-methods", METHODS), (b"access-control-max-age", REMEMBER_SECONDS)]
    return [*headers, (b"access-control-allow-headers", wanted)] if wanted else headers


def _opened(send: Send, headers: Headers) -> Send:
    async def opened(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return opened
