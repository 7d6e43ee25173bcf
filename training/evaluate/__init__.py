"""Evaluation by what the model answers, through the base as it is served."""
