"""OpenAI's Responses API: the same generation, worded otherwise."""
