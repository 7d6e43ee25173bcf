"""A small base model with four adapters, and the scripts that train them."""
