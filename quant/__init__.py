"""4-bit weight formats: read, pack, dequantise. Imports torch only."""
