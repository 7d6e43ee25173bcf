"""Chat: messages to a prompt's text, an answer's text to content, thoughts and calls. Knows nothing of the server."""
