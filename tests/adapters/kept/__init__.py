"""Data directories that earlier versions wrote, one per schema of the registry, killed in the middle. See make.py.

    base/                 the base that all were served with
    schema-N/             the data directory
    schema-N.json         what that version said of it: adapters and mixtures, and what they answered

A directory is never made anew once a version with its schema is out: it is what that version wrote.
"""
