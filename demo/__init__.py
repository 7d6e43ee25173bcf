"""A small base model with three adapters, and the script that trains them."""
