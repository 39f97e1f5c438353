"""The metastore: small, linearizable configuration state behind one interface.

`interface` is what the conductor knows; `sqlite` keeps it in one file beside a single conductor,
`memory` is the fake that the same tests verify. Values are bytes here; `records` turns them into
the model's records.
"""
