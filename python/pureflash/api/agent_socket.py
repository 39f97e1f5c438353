"""The agents' WebSocket: frames in, messages to the conductor; its outbox, frames out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from litestar import WebSocket, websocket
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect, WebSocketException
from litestar.params import SkipValidation

from pureflash.conductor.agents import Session
from pureflash.conductor.service import Conductor
from pureflash.errors import CallerError, ClusterError, Code, PureFlashError
from pureflash.model.messages import Refused, decode_up
from pureflash.process.logs import Log

REGISTER_S: Final = 10.0
"""An agent says first who it is; a connection that says nothing ends."""


@websocket("/v1/agent")
async def agent_socket(
    socket: WebSocket[Any, Any, Any],
    conductor: NamedDependency[Conductor],
    log: NamedDependency[SkipValidation[Log]],
) -> None:
    """Serve one agent until it, or the conductor, ends the connection."""
    await socket.accept()
    session = Session()
    reader = asyncio.create_task(_read(socket, conductor, session))
    try:
        while (frame := await session.outbox.get()) is not None:
            await socket.send_text(frame)
    except (WebSocketDisconnect, WebSocketException, RuntimeError):
        pass  # the agent is gone; the conductor learns it below
    finally:
        conductor.disconnect(session)
        reader.cancel()
        (outcome,) = await asyncio.gather(reader, return_exceptions=True)
        if isinstance(outcome, Exception):
            # Nobody waits for this task's result: without this line the bug would not be seen.
            log.error("api.bug", f"{type(outcome).__name__}: {outcome}")
    await _close(socket)


async def _read(socket: WebSocket[Any, Any, Any], conductor: Conductor, session: Session) -> None:
    try:
        try:
            async with asyncio.timeout(REGISTER_S):
                frame = await _receive(socket)
        except TimeoutError as cause:
            raise ClusterError(
                Code.TIMED_OUT, f"no registration within {REGISTER_S:g} s"
            ) from cause
        while True:
            await conductor.receive(session, decode_up(frame))
            frame = await _receive(socket)
    except PureFlashError as error:
        session.send(
            Refused(
                id=0,
                term=conductor.term,
                code=int(error.code),
                message=error.message,
                next_step=error.next_step,
            )
        )
    except (WebSocketDisconnect, WebSocketException):
        pass  # the ordinary end of a connection
    finally:
        session.close()


async def _receive(socket: WebSocket[Any, Any, Any]) -> str:
    """Take the next frame; the framework's own call gives "" for one of bytes.

    Errors: CallerError INVALID for a frame of bytes; WebSocketDisconnect at the end, also when a
    frame of text is no UTF-8, which the server ends without asking us.
    """
    event: Any = await socket.receive()
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(detail="disconnect event", code=event["code"])
    text: str | None = event.get("text")
    if text is None:
        raise CallerError(
            Code.INVALID,
            "an agent message in a binary frame",
            next_step="send it as text",
        )
    return text


async def _close(socket: WebSocket[Any, Any, Any]) -> None:
    # The other side may have closed it already.
    with contextlib.suppress(WebSocketDisconnect, WebSocketException, RuntimeError):
        await socket.close()
