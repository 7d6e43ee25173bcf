"""How the registry's tables came to be what they are: one script per schema in versions/, which alembic runs.

A script is never changed once a version with it is out: the tables that it made are on disks. What they are now is
in records.py, and a test holds the two together.
"""
