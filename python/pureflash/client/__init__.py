"""The user's side: where the cluster is, the typed client of its API, and the data API.

`context` finds the cluster, `api` speaks HTTP, `cluster` and `device` are what `connect()`
gives. Edges build on these and on `model` only.
"""
