"""`manylora adapters`: the adapters of a running server, over HTTP as anyone; and data directories without one.

Its words are in app.py. server.py asks; shown.py says what answers look like; completion.py tells names to the shell.
looking.py has ls, show and versions; changing.py add, rm, mix, rollback and canary; exporting.py export and push, with
hub.py for the hub's side; fsck.py has fsck.
"""
