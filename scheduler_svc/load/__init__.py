"""Clients that keep a fixed number of sequences running: the load of ``albireo bench host``."""
