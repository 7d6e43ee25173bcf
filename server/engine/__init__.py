"""The engine: sequences, scheduling, KV blocks, adapter residency, sampling, detokenising."""
