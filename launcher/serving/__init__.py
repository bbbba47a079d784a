"""One base and many adapters behind an OpenAI-compatible HTTP server."""
