"""Chat templates: messages to a prompt's text. Knows no tokenizer and nothing else of the server."""
