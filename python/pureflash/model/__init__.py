"""The domain in values: records, states with their tables, messages, tickets. No I/O.

Everything else talks in these types. Records (`domain`) are what the metastore keeps; `messages`
travel between conductor and agents; `rest` is the JSON of the HTTP API; `settings` is what a
process is told. Decoding happens once, at an edge; a value that exists is valid.
"""
