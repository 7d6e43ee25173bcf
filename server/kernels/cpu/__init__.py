"""Native kernels for CPUs: C++ in native/, compiled by build.py, loaded by library.py; see docs/architecture.md."""
