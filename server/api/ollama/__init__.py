"""Ollama's API: the endpoints that generate, and what its programs ask about a model."""
