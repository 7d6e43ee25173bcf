"""The data check: what is wrong with a data set, before a run finds out."""
