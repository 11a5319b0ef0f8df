"""Continuous batching over a paged KV cache, and nothing else: it imports nothing else of the house, and runs by
itself (`python -m scheduler.core`). docs/architecture.md walks one request and one step through it."""
