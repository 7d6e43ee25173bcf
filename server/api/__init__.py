"""The HTTP API: OpenAI routes, adapter routes, auth, metrics. The only room that imports fastapi."""
