"""What a batch's lines spend is in their key's books, also when the server ends in the middle of it."""

import json
from pathlib import Path

from manylora.adapters.registry import AdapterRegistry
from tests.server.api.running import BASE, Files, running
from tests.server.api.tenants import ADMIN, new_key


def test_lines_that_the_end_cuts_off_are_charged(files: Files, tmp_path: Path) -> None:
    body = {"model": BASE, "prompt": "hello there", "max_tokens": 100, "ignore_eos": True}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    lines = "".join(json.dumps({"custom_id": str(n), **line}) + "\n" for n in range(80))
    with running(files, tmp_path, admin_key=ADMIN) as server:
        keys = server.server.deps.keys
        with server.client(new_key(server, "acme", budget=1_000_000)) as client:
            file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
            client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            server.wait_until_busy()
    (path,) = tmp_path.glob("*/registry.db")
    with AdapterRegistry(path) as registry:
        (record,) = registry.keys.all()
    assert record.spent == keys.used(record.id) > 0
