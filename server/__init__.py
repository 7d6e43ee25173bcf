"""The inference server: HTTP API, engine, model and kernels."""
