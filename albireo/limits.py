"""Limits that several services must agree on."""

MAX_WORD_TOKENS = 64
"""Of a bad word: ranks keep as many tokens of each output in order."""

MAX_LOGPROBS = 20
"""Likeliest tokens that are named beside a sampled one: ranks have room for so many."""
