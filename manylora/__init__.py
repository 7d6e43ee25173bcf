"""The front door: the `manylora` command. The only room that imports several of the others."""
