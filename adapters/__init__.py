"""LoRA adapters on disk and in the registry. Never imports the server."""
