"""Processes for what comes from outside and may run for ever or take all memory: limited, and replaced if need be."""
