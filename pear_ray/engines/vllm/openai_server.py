"""One model behind vLLM's own OpenAI routes, in this process: no socket, no second parser."""

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from pear_ray.engines.model_files import max_positions
from pear_ray.engines.vllm.spec import CPU_BATCHED_TOKENS, CPU_BLOCK_TOKENS, ServerSpec
from pear_ray.errors import EngineError

Message = MutableMapping[str, Any]
TASKS = ("generate",)
# A message per token, 32 streams at once and two hops through Ray took five times vLLM's own CPU;
# twenty pieces a second still read as a stream. (`ray.serve.llm` waits as long.)
JOINED_S = 0.05
LEAVING_S = 5.0  # for a route to see that nobody listens any more
DEFAULT_POSITIONS = 2048  # where a model's config gives no limit


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What comes before an answer's body."""

    status: int
    media_type: str


class OpenAiServer:
    """A started engine with vLLM's routes on it; `start` makes one."""

    def __init__(self, engine: AsyncLLM, app: Callable[..., Coroutine[Any, Any, None]]) -> None:
        self._engine, self._app = engine, app

    async def check_health(self) -> None:
        """Raise where the engine's process has ended."""
        await self._engine.check_health()

    def close(self) -> None:
        """End the engine's process."""
        self._engine.shutdown()

    @contextlib.asynccontextmanager
    async def answering(
        self, method: str, path: str, body: bytes
    ) -> AsyncIterator[tuple[AnswerHead, AsyncIterator[bytes]]]:
        """What vLLM's route answers: its head, and the body in pieces as they are made.

        Pieces that come within 50 ms are joined. Leaving early ends the request: vLLM is told,
        as by a closed connection, and stops to sample.
        """
        sent: asyncio.Queue[Message] = asyncio.Queue()
        gone = asyncio.Event()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(self._app(_scope(method, path), receive, sent.put))
        # An error that vLLM's handlers leave has been answered as 500 by then; or this says so.
        task.add_done_callback(lambda done: sent.put_nowait(_ending(done)))
        try:
            start = await sent.get()
            if start["type"] != "http.response.start":
                raise EngineError(f"{path}: no answer from vLLM ({start.get('error')})")
            yield AnswerHead(start["status"], _media_type(start)), _pieces(sent)
        finally:
            gone.set()
            # Mostly it has nothing left to do; what is cut off must be told to the engine.
            _, going_on = await asyncio.wait({task}, timeout=LEAVING_S)
            for each in going_on:
                each.cancel()


async def start(spec: ServerSpec) -> OpenAiServer:
    """Start an engine process on `spec.model`, with the adapters loaded and the routes on it.

    Raises:
        EngineError: vLLM could not.
    """
    frontend = FrontendArgs(
        lora_modules=[LoRAModulePath(name, folder) for name, folder in spec.adapters.items()],
        disable_fastapi_docs=True,
        fingerprint_mode="none",
    )
    arguments = AsyncEngineArgs(**_options(spec))
    try:
        config = arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        engine = AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=[RayPrometheusStatLogger] if spec.ray_metrics else None,
        )
        both = argparse.Namespace(**(vars(frontend) | vars(arguments)))
        app = build_app(both, TASKS, engine.model_config)
        await init_app_state(engine, app.state, both, TASKS)
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"{spec.model}: vLLM could not start a server ({type(error).__name__}: {error}); "
            "`pear doctor` starts an engine on the embedded model and shows what is missing"
        ) from error
    return OpenAiServer(engine, app)


def _options(spec: ServerSpec) -> dict[str, Any]:
    positions = max_positions(Path(spec.model)) or DEFAULT_POSITIONS
    options: dict[str, Any] = {
        "model": spec.model,
        "served_model_name": [spec.name],
        "dtype": spec.dtype,
        "max_num_seqs": spec.max_num_seqs,
        # What the checkpoint suggests (a temperature of 0.6, a top-p) would change a caller's
        # sampling unsaid, and is not what RL sampled with: a request has what it says, and the
        # API's defaults. End tokens of generation_config.json hold all the same.
        "generation_config": "vllm",
        # As the trainer's: a bfloat16 head rounds logits of 16 and more to steps of 0.125 nats.
        "hf_overrides": {"head_dtype": "float32"},
        "trust_remote_code": False,
        "enable_log_requests": False,
        "tensor_parallel_size": spec.tensor_parallel_size,
        # Inside a Ray actor vLLM would take Ray for its workers, and ask it for devices anew.
        "distributed_executor_backend": "mp" if spec.tensor_parallel_size > 1 else "uni",
    }
    if spec.adapters:
        rank = next(each for each in get_args(MaxLoRARanks) if each >= spec.max_lora_rank)
        many = len(spec.adapters)
        options |= {"enable_lora": True, "max_loras": many, "max_cpu_loras": many}
        options["max_lora_rank"] = rank
    if spec.device == "cpu":
        options |= {
            "enforce_eager": True,
            "max_model_len": positions,
            # As in engine.py: a seeded request whose prompt is cut over two batches fails on CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, positions),
            "block_size": CPU_BLOCK_TOKENS,
        }
    return options


async def _pieces(sent: "asyncio.Queue[Message]") -> AsyncIterator[bytes]:
    """The body: its first message at once, later ones joined for `JOINED_S`."""
    more, wait_s = True, 0.0
    while more:
        message = await sent.get()
        parts = [message.get("body", b"")]
        more = message.get("more_body", False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while more:
                    message = await sent.get()
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
        wait_s = JOINED_S
        if piece := b"".join(parts):
            yield piece


def _ending(task: "asyncio.Task[None]") -> Message:
    error = None if task.cancelled() else task.exception()
    return {"type": "ended", "error": repr(error)}


def _media_type(start: Message) -> str:
    headers = dict(start.get("headers", ()))
    return headers.get(b"content-type", b"application/json").decode("latin-1")


def _scope(method: str, path: str) -> Message:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"pear")],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
