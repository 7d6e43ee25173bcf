"""What `manylora bench` runs: loads a server, the engine, the kernels and the peers, and tells what it measured."""
