"""Teachers behind an OpenAI-compatible API."""
