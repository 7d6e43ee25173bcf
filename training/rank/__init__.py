"""The rank of an adapter during training: fixed, growing by a schedule, or AdaLoRA."""
