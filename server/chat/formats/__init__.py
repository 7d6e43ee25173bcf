"""How families of models write calls of tools: for each a reader, and the grammar that an answer can be held to."""
