"""Albireo: LLM inference services over gRPC."""

__version__ = "0.1.0"
