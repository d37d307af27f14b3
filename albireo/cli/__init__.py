"""The ``albireo`` command: the local launcher and clients of a running server."""
