"""What `pf up` runs: one supervisor that starts, watches and stops the processes of a cluster.

`policy` decides about restarts (pure), `cluster` makes the directory and the settings files,
`children` runs the processes, `server` is the process itself.
"""
