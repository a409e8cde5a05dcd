"""A job's log as it grows, over a line that may drop: the job is never ended by that."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import aiohttp
import requests

from pear_ray.errors import ClusterError
from pear_ray.submission.client import Client
from pear_ray.submission.known import SentJob, sent_jobs

# A log that is silent for so long is asked for anew: a laptop that slept still holds a connection
# over which nothing will ever come.
SILENT_S = 60.0
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
GIVE_UP_S = 1800.0
_LOST = (aiohttp.ClientError, RuntimeError, OSError, requests.exceptions.RequestException)


def follow(client: Client, job_id: str, write: Callable[[str], object]) -> SentJob:
    """Write the job's log from its beginning until the job ends; how it ended.

    Where the connection drops it is made again, and the log goes on where it was.

    Raises:
        ClusterError: There was no connection for half an hour, or the job is not known any more.
    """
    return asyncio.run(_Following(client, job_id, write).to_end())


class _Following:
    """What has been written of one job's log."""

    def __init__(self, client: Client, job_id: str, write: Callable[[str], object]) -> None:
        self._client, self._job_id, self._write = client, job_id, write
        self._written = 0  # characters: a log only grows, and is sent from its beginning each time
        self._lost_since: float | None = None

    async def to_end(self) -> SentJob:
        while True:
            try:
                await self._read()
                jobs = await asyncio.to_thread(sent_jobs, self._client)
            except (*_LOST, ClusterError) as error:
                await self._wait(error)
                continue
            job = next((job for job in jobs if job.job_id == self._job_id), None)
            if job is None:
                raise ClusterError(
                    f"{self._client.get_address()} does not know job {self._job_id} any more: its "
                    "head was replaced; submit the run again, and it goes on where it was"
                )
            if not job.is_running:
                return job
            await asyncio.sleep(RETRY_S[0])  # the log ended before the state was written down

    async def _read(self) -> None:
        """Take what is new, until the log ends or is silent."""
        passed = 0
        log = self._client.tail_job_logs(self._job_id)
        try:
            while (chunk := await self._next(log)) is not None:
                self._found()
                new = chunk[max(0, self._written - passed) :]
                passed += len(chunk)
                if new:
                    self._write(new)
                    self._written += len(new)
        finally:
            await log.aclose()

    async def _next(self, log: AsyncIterator[str]) -> str | None:
        """The next piece of the log; None at its end, and where nothing comes."""
        try:
            return await asyncio.wait_for(anext(log), SILENT_S)
        except (StopAsyncIteration, TimeoutError):
            return None

    def _found(self) -> None:
        if self._lost_since is not None:
            self._write("[connected again; the log goes on]\n")
            self._lost_since = None

    async def _wait(self, error: Exception) -> None:
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
            self._write(
                f"[the connection is lost ({type(error).__name__}); the job goes on, and this "
                "command tries to reach it again]\n"
            )
        gone_s = now - self._lost_since
        if gone_s > GIVE_UP_S:
            raise ClusterError(
                f"no connection to {self._client.get_address()} for {gone_s / 60:.0f} minutes; "
                f"the job goes on without us: `pear logs {self._job_id} --follow` attaches again"
            ) from error
        await asyncio.sleep(next((s for s in RETRY_S if gone_s < 4 * s), RETRY_S[-1]))
