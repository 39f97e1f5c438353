"""Executable specification: slow, obvious, and written from the documents, not from the code."""
