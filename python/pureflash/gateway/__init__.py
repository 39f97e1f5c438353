"""Gateway: negotiation machines of the front ends and the process around `_core`."""
