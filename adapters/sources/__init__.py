"""Ways in: from what a client or the operator calls a source to an adapter's files in a folder of the store."""
