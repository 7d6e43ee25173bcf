"""The scripts, named by the schema that they lead to."""
