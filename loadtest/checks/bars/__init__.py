"""The bars: what the server promises about exactness, swapping, scale and hang-ups, each measured on real servers."""
