"""Base models for training: 16-bit, NF4, GPTQ and AWQ, and putting LoRA on them."""
