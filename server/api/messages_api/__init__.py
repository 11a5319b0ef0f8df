"""Anthropic's Messages API: the same generation, worded otherwise."""
