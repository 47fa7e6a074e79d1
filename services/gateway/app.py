"""The HTTP side: routes, request ids, and every error as an OpenAI body. Pure ASGI."""

from __future__ import annotations

import contextlib
import functools
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import h11
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from common.errors import (
    InternalError,
    InvalidKey,
    MethodNotAllowed,
    MoeculeError,
    NotAllowed,
    NotFound,
    RequestCancelled,
)
from common.tracing import NOT_RECORDED, Span
from services.gateway.cache import Forgotten
from services.gateway.docs_page import docs_page
from services.gateway.generate import Endpoint, Generator, send_json
from services.gateway.keys import ADMIN_PATHS, OPEN_PATHS, Keys, bearer
from services.gateway.metrics import GatewayMetrics
from services.gateway.openapi import ModelCard, ModelList, Served, Status, document
from services.gateway.protocol import ChatBody, CompletionBody
from services.gateway.responses import error_body
from services.gateway.responses_api import ResponsesEndpoint
from services.gateway.tokenize import Counter, DetokenizeBody, TokenizeBody

HOST = re.compile(r"[A-Za-z0-9.:\[\]-]{1,260}")  # DNS names have 253 characters at most, a port 5
ADDRESS = f"http://{secrets.token_hex(16)}.invalid"  # that no document holds otherwise


class App:
    """`not_ready`: why no worker can serve, None when one can. `metrics_text`: the page of /metrics. `forget_pages`:
    empties the workers' prefix caches. `page`: the routes of the page at / and of its data. `asyncapi`: the document of
    the NATS door."""

    def __init__(
        self,
        generator: Generator,
        keys: Keys,
        metrics: GatewayMetrics,
        not_ready: Callable[[], MoeculeError | None],
        metrics_text: Callable[[], Awaitable[str]],
        forget_pages: Callable[[], Awaitable[Forgotten]],
        page: Sequence[Route],
        created: int,
        log: Any,
        asyncapi: bytes,
    ) -> None:
        self._traces = generator.traces
        self._preparer = generator.preparer
        self._read_body = generator.read_body
        self._counter = Counter(generator.preparer)
        self._keys = keys
        self._metrics = metrics
        self._not_ready = not_ready
        self._metrics_text = metrics_text
        self._forget_pages = forget_pages
        self._created = created
        self._log = log
        self._asyncapi_page = asyncapi
        self._router = Router(
            [
                Route("/v1/completions", Endpoint(generator, CompletionBody), methods=["POST"]),
                Route("/v1/chat/completions", Endpoint(generator, ChatBody), methods=["POST"]),
                Route("/v1/responses", ResponsesEndpoint(generator), methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
                Route("/reset_prefix_cache", self._reset_prefix_cache, methods=["POST"]),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics_page),
                Route("/openapi.json", self._openapi),
                Route("/asyncapi.json", self._asyncapi),
                Route("/docs", self._docs),
                *page,
            ]
        )
        routes = [route for route in self._router.routes if isinstance(route, Route)]
        self._paths = {route.path for route in routes}
        self._traced = {route.path for route in routes if isinstance(route.endpoint, Endpoint)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        scope["moecule.headers"] = dict(scope["headers"])
        answer = _Tagged(send, _request_id(scope))
        scope["moecule.request_id"] = answer.request_id
        scope["app"] = self  # makes the router raise its 404 and 405 instead of answering in plain text
        try:
            with self._span(scope):
                self._check_key(scope)
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

    def _span(self, scope: Scope) -> contextlib.AbstractContextManager[Span]:
        """Of a request to generate, also of one that is refused at once."""
        if scope["method"] != "POST" or scope["path"] not in self._traced:
            return contextlib.nullcontext(NOT_RECORDED)

        def header(name: str) -> str:
            value: bytes = scope["moecule.headers"].get(name.encode(), b"")
            return value.decode("latin-1")

        return self._traces.request(f"POST {scope['path']}", header)

    def _check_key(self, scope: Scope) -> None:
        """Raises InvalidKey or NotAllowed. Endpoints find whoever asks in the scope."""
        if scope["path"] in OPEN_PATHS:
            return
        caller = scope["moecule.caller"] = self._keys.caller(bearer(scope["headers"]))
        if scope["path"] in ADMIN_PATHS and not caller.key.admin:
            raise NotAllowed(f"key {caller.key.name!r} may not do this: it concerns everyone, and needs admin=1")

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
        headers = _retry_headers(error)
        if isinstance(error, InvalidKey):
            headers.append((b"www-authenticate", b"Bearer"))
        headers += [(name.lower().encode(), value.encode()) for name, value in (extra or {}).items()]
        await send_json(answer, error_body(error), error.status, headers)

    # ---- the small endpoints

    def _card(self) -> ModelCard:
        preparer = self._preparer
        return ModelCard(
            id=preparer.name, created=self._created, max_model_len=preparer.context, weights=preparer.weights
        )

    def model_list(self) -> ModelList:
        return ModelList(data=[self._card()])

    async def _models(self, _: Request) -> Response:
        return _json(self.model_list())

    async def _model(self, request: Request) -> Response:
        self._preparer.check_model(request.path_params["name"])
        return _json(self._card())

    async def _tokenize(self, request: Request) -> Response:
        with request.scope["moecule.caller"].request():
            body = await self._read_body(request.scope, request.receive, TokenizeBody)
            return _json(await self._counter.tokenize(body))

    async def _detokenize(self, request: Request) -> Response:
        with request.scope["moecule.caller"].request():
            body = await self._read_body(request.scope, request.receive, DetokenizeBody)
            return _json(await self._counter.detokenize(body))

    async def _reset_prefix_cache(self, _: Request) -> Response:
        return _json(await self._forget_pages())

    async def _health(self, _: Request) -> Response:
        return _json(Status("alive"))

    async def _ready(self, _: Request) -> Response:
        if error := self._not_ready():
            raise error
        return _json(Status("ready"))

    async def _metrics_page(self, _: Request) -> Response:
        text = await self._metrics_text()
        return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _openapi(self, request: Request) -> Response:
        return Response(_at_its_address(self._documents[0], request), media_type="application/json")

    async def _asyncapi(self, _: Request) -> Response:
        return Response(self._asyncapi_page, media_type="application/json")

    async def _docs(self, request: Request) -> Response:
        return Response(_at_its_address(self._documents[1], request), media_type="text/html")

    @functools.cached_property
    def _documents(self) -> tuple[bytes, bytes]:
        """The OpenAPI document and the page of docs, made once: that takes long, and each client has its own address
        for us. ADDRESS stands for it."""
        preparer = self._preparer
        found = document(Served(ADDRESS, preparer.name, preparer.config.vocab, self._keys.wanted))
        return msgspec.json.encode(found), docs_page(found).encode()


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
        # A client that broke HTTP in the middle of its request cannot be answered any more; uvicorn closes.
        with contextlib.suppress(h11.LocalProtocolError):
            await self._send(message)


def _request_id(scope: Scope) -> str:
    """The client's own, if it is a plain word."""
    theirs = scope["moecule.headers"].get(b"x-request-id", b"")
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


def _at_its_address(page: bytes, request: Request) -> bytes:
    """With the address where the client reached us, for examples that it can run as they are. Neither JSON nor HTML
    has a form of its own for what a host's name is made of."""
    host = request.headers.get("host", "")
    if not HOST.fullmatch(host):
        host = "{}:{}".format(*request.scope["server"])
    return page.replace(ADDRESS.encode(), f"http://{host}".encode())


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
