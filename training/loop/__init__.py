"""The training loop: loss, steps, checkpoints, resume, and what happens when it goes wrong."""
