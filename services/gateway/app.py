"""The HTTP side: routes, request ids, and every error as an OpenAI body. Pure ASGI."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from common.errors import InternalError, MethodNotAllowed, MoeculeError, NotFound, NoWorker, RequestCancelled
from services.gateway.generate import JSON_HEADERS, Endpoint, Generator
from services.gateway.metrics import GatewayMetrics
from services.gateway.protocol import ChatBody, CompletionBody
from services.gateway.responses import error_body

Handler = Callable[[Request], Awaitable[Response]]


class App:
    """`why_not_ready`: a sentence, empty when a worker can serve. `metrics_text`: the page of /metrics."""

    def __init__(
        self,
        generator: Generator,
        metrics: GatewayMetrics,
        why_not_ready: Callable[[], str],
        metrics_text: Callable[[], Awaitable[str]],
        created: int,
        log: Any,
    ) -> None:
        self._preparer = generator.preparer
        self._metrics = metrics
        self._why_not_ready = why_not_ready
        self._metrics_text = metrics_text
        self._created = created
        self._log = log
        self._router = Router(
            [
                Route("/v1/completions", Endpoint(generator, CompletionBody), methods=["POST"]),
                Route("/v1/chat/completions", Endpoint(generator, ChatBody), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics_page),
            ]
        )
        self._paths = {route.path for route in self._router.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        answer = _Tagged(send, _request_id(scope))
        scope["moecule.request_id"] = answer.request_id
        scope["app"] = self  # makes the router raise its 404 and 405 instead of answering in plain text
        try:
            await self._router(scope, receive, answer)
        except HTTPException as error:
            await self._fail(answer, _as_ours(error, scope), scope, error.headers or {})
        except MoeculeError as error:
            await self._fail(answer, error, scope)
        except Exception:
            # The boundary of the service: whatever broke, the client is answered.
            self._log.exception("a request broke", path=scope["path"], request=answer.request_id)
            await self._fail(answer, InternalError("internal error"), scope)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.answered(path, answer.status)

    async def _fail(
        self, answer: _Tagged, error: MoeculeError, scope: Scope, extra: Mapping[str, str] | None = None
    ) -> None:
        if isinstance(error, RequestCancelled):
            answer.status = error.status  # nobody is there to read it
            return
        if answer.status:
            raise error  # the body is under way: cutting the connection is the only word left
        if error.status >= 500:
            # Whoever waits for the start asks /ready again and again.
            tell = self._log.debug if scope["path"] == "/ready" else self._log.warning
            tell("refused", path=scope["path"], code=error.code, why=error.message)
        data = error_body(error)
        headers = [*JSON_HEADERS, (b"content-length", str(len(data)).encode()), *_retry_headers(error)]
        headers += [(name.lower().encode(), value.encode()) for name, value in (extra or {}).items()]
        await answer({"type": "http.response.start", "status": error.status, "headers": headers})
        await answer({"type": "http.response.body", "body": data})

    # ---- the small endpoints

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._preparer.name,
            "object": "model",
            "created": self._created,
            "owned_by": "moecule",
            "max_model_len": self._preparer.context,
        }

    async def _models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._preparer.check_model(request.path_params["name"])
        return _json(self._card())

    async def _health(self, _: Request) -> Response:
        return _json({"status": "alive"})

    async def _ready(self, _: Request) -> Response:
        if why := self._why_not_ready():
            raise NoWorker(why)
        return _json({"status": "ready"})

    async def _metrics_page(self, _: Request) -> Response:
        text = await self._metrics_text()
        return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


class _Tagged:
    """`send`, with the request id on the answer; `status` is 0 until the answer begins."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self.request_id.encode())]
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """The client's own, if it is a plain word."""
    theirs = dict(scope["headers"]).get(b"x-request-id", b"")
    return theirs.decode() if re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", theirs) else secrets.token_hex(12)


def _as_ours(error: HTTPException, scope: Scope) -> MoeculeError:
    if error.status_code == 405:
        return MethodNotAllowed(f"{scope['path']} does not take {scope['method']}")
    if error.status_code == 404:
        return NotFound(f"there is nothing at {scope['path']}")
    return InternalError(str(error.detail))


def _retry_headers(error: MoeculeError) -> list[tuple[bytes, bytes]]:
    if error.retry_after is None:
        return [(b"x-should-retry", b"false")]
    return [(b"retry-after", str(error.retry_after).encode())]


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
