"""The ops of a decoder block: what a backend is, the reference that is its spec, and the backends."""
