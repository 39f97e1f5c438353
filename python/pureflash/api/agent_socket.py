"""The agents' WebSocket: frames in, messages to the conductor; its outbox, frames out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from litestar import WebSocket, websocket
from litestar.di import NamedDependency
from litestar.exceptions import WebSocketDisconnect, WebSocketException

from pureflash.conductor.agents import Session
from pureflash.conductor.service import Conductor
from pureflash.errors import PureFlashError
from pureflash.model.messages import Refused, decode_up


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
        while True:
            message = decode_up(await socket.receive_data(mode="text"))
            await conductor.receive(session, message)
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
