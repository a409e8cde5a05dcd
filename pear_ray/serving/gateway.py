"""What callers reach: checks the key, finds the model that a request names, passes it on.

It reads a request's `model` and `stream` and no more; the rest is vLLM's to parse, once, where the
engine is.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from pear_ray.serving.key import KeyCheck, key_from_environment
from pear_ray.serving.settings import ServeSettings

POSTED = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
OPEN = ("/health",)  # without a key: for load balancers, and it says nothing of the models
MAX_BODY_BYTES = 8 * 2**20  # a million tokens and more
HEALTH_TIMEOUT_S = 5.0
Handles = Mapping[str, DeploymentHandle]


class Gateway:
    """The deployment in front; Ray Serve takes its ASGI application when it is made."""

    def __init__(self, settings: dict[str, Any], handles: dict[str, DeploymentHandle]) -> None:
        plan = ServeSettings.model_validate(settings)
        key = key_from_environment(needed=plan.needs_key, why="the deployment needs a key")
        self._app = gateway_app(plan, handles, KeyCheck(key))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app


def gateway_app(settings: ServeSettings, handles: Handles, check: KeyCheck) -> Starlette:
    """The application that answers on the models of `settings` through the `handles` of each."""
    routes = _Routes(settings, handles)
    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            *(Route(path, routes.passed_on, methods=["POST"]) for path in POSTED),
        ],
        middleware=[Middleware(AskKey, check=check)],
        exception_handlers={HTTPException: _http_error, Exception: _failure},
    )


class AskKey:
    """Answers 401 to who does not bring the key, before anything of the request is read."""

    def __init__(self, app: ASGIApp, check: KeyCheck) -> None:
        self._app, self._check = app, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on who may; lifespan and the open paths always."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self._app(scope, receive, send)
        headers = {name: value for name, value in scope["headers"] if name == b"authorization"}
        given = headers.get(b"authorization", b"").decode("latin-1")
        if self._check.admits(given):
            return await self._app(scope, receive, send)
        said = "wrong API key" if given else "no API key"
        refusal = error_response(
            401,
            f"{said}; send the server's key as `Authorization: Bearer KEY` (OpenAI's clients: "
            "api_key=...)",
            code="invalid_api_key",
        )
        refusal.headers["www-authenticate"] = "Bearer"
        return await refusal(scope, receive, send)


class _Routes:
    def __init__(self, settings: ServeSettings, handles: Handles) -> None:
        self._cards = [_card(name, parent) for name, parent in _names(settings)]
        # Bound once: each new handle has a metrics pusher of its own.
        targets = {name: _Target(handle) for name, handle in handles.items()}
        self._targets = {
            name: targets[model.name]
            for model in settings.models
            for name in (model.name, *(adapter.name for adapter in model.adapters))
        }
        self._models = targets

    async def health(self, _: Request) -> Response:
        """200 where every model has a replica that answers for its engine."""
        healthy = await asyncio.gather(*(each.is_healthy() for each in self._models.values()))
        if not all(healthy):
            down = len(healthy) - sum(healthy)
            return error_response(503, f"no healthy replica of {down} models", code="down")
        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        """Every name that a request may ask for."""
        return JSONResponse({"object": "list", "data": self._cards})

    async def model(self, request: Request) -> Response:
        """One of them."""
        found = [card for card in self._cards if card["id"] == request.path_params["name"]]
        return JSONResponse(found[0]) if found else self._unknown(request.path_params["name"])

    async def passed_on(self, request: Request) -> Response:
        """The answer of the model that the request names."""
        body = await request.body()
        if len(body) > MAX_BODY_BYTES:
            limit = MAX_BODY_BYTES // 2**20
            return error_response(413, f"a request of {len(body)} bytes; {limit} MiB are allowed")
        try:
            asked = json.loads(body)
        except ValueError as error:  # not UTF-8, or not JSON
            return error_response(400, f"the body is not JSON ({error})")
        name = asked.get("model") if isinstance(asked, dict) else None
        if not isinstance(name, str):
            return error_response(
                400, f"the body names no `model`; here are {self._known()}", param="model"
            )
        if name not in self._targets:
            return self._unknown(name)
        target = self._targets[name]
        answer = target.streamed if asked.get("stream") else target.whole
        return await answer(request.url.path, body)

    def _known(self) -> str:
        return ", ".join(f"`{name}`" for name in self._targets)

    def _unknown(self, name: str) -> Response:
        return error_response(
            404,
            f"no model `{name[:100]}`; here are {self._known()}",
            param="model",
            code="model_not_found",
        )


class _Target:
    """The replicas of one model."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._whole = handle.answer_whole
        self._streamed = handle.options(stream=True).answer
        self._healthy = handle.is_healthy

    async def whole(self, path: str, body: bytes) -> Response:
        """The answer in one piece."""
        status, media_type, content = await self._whole.remote(path, body)
        return Response(content, status_code=status, media_type=media_type)

    async def streamed(self, path: str, body: bytes) -> Response:
        """The answer as it comes."""
        pieces = self._streamed.remote(path, body)
        status, media_type = await anext(pieces)

        async def passed() -> AsyncIterator[bytes]:
            async for piece in pieces:
                yield piece

        return StreamingResponse(passed(), status_code=status, media_type=media_type)

    async def is_healthy(self) -> bool:
        """Whether a replica answers that its engine runs."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                return await self._healthy.remote()
        except Exception:  # noqa: BLE001 - whatever keeps it from answering, it is not healthy
            return False


def error_response(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """An error in the shape that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004 - HTTP
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    return error_response(error.status_code, error.detail)


async def _failure(_: Request, error: Exception) -> Response:
    return error_response(503, f"the model did not answer ({type(error).__name__}); try again")


def _names(settings: ServeSettings) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for model in settings.models:
        found += [(model.name, None), *((each.name, model.name) for each in model.adapters)]
    return found


def _card(name: str, parent: str | None) -> dict[str, Any]:
    # No folders: where a model lies is nobody's business.
    return {"id": name, "object": "model", "created": 0, "owned_by": "pear_ray", "parent": parent}
