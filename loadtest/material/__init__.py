"""What measurements and tests are made of: models, data, prompts, servers in processes, the client."""
