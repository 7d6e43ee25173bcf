"""`python -m manylora`, the same as the `manylora` command."""

from manylora.cli import main

main()
