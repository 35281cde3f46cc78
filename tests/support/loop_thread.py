"""One event loop in one thread, which ends with nothing left behind."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self


class LoopThread:
    """Runs coroutines for threads that have no loop of their own.

    A server derives from it, opens in `_open` and closes in `_close`, both run on the loop. An
    exception nobody caught on the loop comes out of `with` at its end.
    """

    def __init__(self) -> None:
        self.faults: list[BaseException] = []
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
            raise RuntimeError(f"{self._thread.name} does not end")
        if self.faults and value is None:
            raise BaseExceptionGroup(f"in {self._thread.name}", self.faults)

    def call[Value](self, work: Coroutine[Any, Any, Value], timeout: float = 10.0) -> Value:
        """Run `work` on the loop and wait for what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    async def _open(self) -> None:
        """Start to listen."""

    async def _close(self) -> None:
        """Stop listening and let go of every connection."""

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as fault:  # noqa: BLE001 - carried to the thread that asked
            self.faults.append(fault)
            if not self._ready.done():
                self._ready.set_exception(fault)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._note)
        self._stop = asyncio.Event()
        await self._open()
        self._ready.set_result(None)
        await self._stop.wait()
        await self._close()
        await self._turns()

    async def _turns(self) -> None:
        """Let the loop run what asyncio does later, when a connection opens or ends."""
        for _ in range(4):
            await asyncio.sleep(0)

    def _note(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.faults.append(context.get("exception") or RuntimeError(str(context["message"])))
