"""The HTTP API of the conductor: `/v1`, the agents' WebSocket, metrics and documentation.

`app` assembles the handlers over one `Conductor`; `guard` decides who may call; `problems` is the
only place that turns an error into a response; `server` puts it on a socket and is the conductor
process.
"""
