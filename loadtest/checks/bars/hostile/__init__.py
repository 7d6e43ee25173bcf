"""The bar of hostile requests: what they are, how they are sent, and what well-behaved streams beside them notice."""
