"""Data files: reading, formats, chat templates, the mask of trained tokens, packing, collation."""
