"""Load client and benchmarks."""
