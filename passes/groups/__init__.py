"""Tokens in groups: where they are joined, and blocks that run on some of them."""
