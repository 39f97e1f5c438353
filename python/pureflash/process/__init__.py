"""What every process shares: settings from files, log lines, life cycle, the agent's link.

Apart from `model` because all of it is I/O; apart from the processes because each must read, log,
start and stop in exactly the same way.
"""
