"""The agents' WebSocket: frames in, messages to the conductor; its outbox, frames out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from litestar import WebSocket, websocket
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect, WebSocketException

from pureflash.conductor.agents import Session
from pureflash.conductor.service import Conductor
from pureflash.errors import ClusterError, Code, PureFlashError
from pureflash.model.messages import Refused, decode_up

REGISTER_S: Final = 10.0
"""An agent says first who it is; a connection that says nothing ends."""


@websocket("/v1/agent")
async def agent_socket(
    socket: WebSocket[Any, Any, Any], conductor: NamedDependency[Conductor]
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
        await asyncio.gather(reader, return_exceptions=True)
    await _close(socket)


async def _read(socket: WebSocket[Any, Any, Any], conductor: Conductor, session: Session) -> None:
    try:
        try:
            async with asyncio.timeout(REGISTER_S):
                frame = await socket.receive_data(mode="text")
        except TimeoutError as cause:
            raise ClusterError(
                Code.TIMED_OUT, f"no registration within {REGISTER_S:g} s"
            ) from cause
        while True:
            await conductor.receive(session, decode_up(frame))
            frame = await socket.receive_data(mode="text")
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


async def _close(socket: WebSocket[Any, Any, Any]) -> None:
    # The other side may have closed it already.
    with contextlib.suppress(WebSocketDisconnect, WebSocketException, RuntimeError):
        await socket.close()
