"""One model's replica: an actor with vLLM's server inside."""

from collections.abc import AsyncIterator
from typing import Any

from pear_ray.engines.importing import collector_paused
from pear_ray.engines.vllm.spec import ServerSpec


class ModelReplica:
    """Answers what the gateway passes on."""

    async def __init__(self, spec: ServerSpec) -> None:
        # Imported here: this module is also read by the controller, which needs no vLLM.
        with collector_paused():
            from pear_ray.engines.vllm import openai_server  # noqa: PLC0415

        self._server = await openai_server.start(spec)

    async def answer(self, path: str, body: bytes) -> AsyncIterator[Any]:
        """(status, media type), then the body in pieces, as they come."""
        async with self._server.answering("POST", path, body) as (head, pieces):
            yield (head.status, head.media_type)
            async for piece in pieces:
                yield piece

    async def answer_whole(self, path: str, body: bytes) -> tuple[int, str, bytes]:
        """(status, media type, body): one message instead of three."""
        async with self._server.answering("POST", path, body) as (head, pieces):
            return head.status, head.media_type, b"".join([piece async for piece in pieces])

    async def is_healthy(self) -> bool:
        """Whether the engine runs."""
        await self.check_health()
        return True

    async def check_health(self) -> None:
        """Asked by Ray Serve now and then; an error has the replica replaced."""
        await self._server.check_health()
