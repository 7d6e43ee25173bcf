"""Makes adapters: from a data file to a PEFT adapter that the server takes."""
