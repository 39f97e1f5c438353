"""The store process: a shell of Python around `_core.StoreNode`, which does all I/O."""
