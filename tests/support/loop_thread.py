"""Run an asyncio event loop in a thread, and stop it cleanly."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self


class LoopThread:
    """Runs coroutines for threads that have no event loop.

    A server overrides `_open` and `_close`, which run on the loop. The end of the `with` block
    raises the exceptions that nothing on the loop caught.
    """

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        if self._thread.is_alive():
            raise RuntimeError(f"{self._thread.name} did not stop within 10 s")
        if self.errors and value is None:
            raise BaseExceptionGroup(f"in {self._thread.name}", self.errors)

    def call[Value](self, work: Coroutine[Any, Any, Value], timeout: float = 10.0) -> Value:
        """Run `work` on the loop and return its result. Call it from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    async def _open(self) -> None:
        """Start listening."""

    async def _close(self) -> None:
        """Stop listening and close every connection."""

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
            self.errors.append(error)
            if not self._ready.done():
                self._ready.set_exception(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._record_error)
        self._stop = asyncio.Event()
        await self._open()
        self._ready.set_result(None)
        await self._stop.wait()
        await self._close()
        await self._run_pending_callbacks()

    async def _run_pending_callbacks(self) -> None:
        """Let asyncio finish the callbacks that it schedules when a connection opens or closes."""
        for _ in range(4):
            await asyncio.sleep(0)

    def _record_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(context.get("exception") or RuntimeError(str(context["message"])))
