"""The store of files: what is being written is left alone, and nothing passes its bounds."""

from pathlib import Path

from manylora.server.batches.ending import finish
from manylora.server.batches.files import FileStore
from manylora.server.batches.records import Batch, Usage


def test_what_is_being_written_is_left_alone_until_the_next_start(tmp_path: Path) -> None:
    files = FileStore(tmp_path, largest=100, most=1000)
    incoming = files.new()
    incoming.write(b"half")
    files.sweep()
    incoming.write(b" and half")
    incoming.finish()
    files.sweep()
    assert (tmp_path / "files" / incoming.id).read_bytes() == b"half and half"
    files.close()
    FileStore(tmp_path, largest=100, most=1000).close()
    assert not list((tmp_path / "files").iterdir()), "nobody knows it"


def test_what_a_batch_ends_with_outlives_a_sweep(tmp_path: Path) -> None:
    files = FileStore(tmp_path, largest=100, most=1000)
    batch = Batch("batch_1", "me", "key", "/v1/completions", "file-1", 0, 1)
    files.input_of(batch.id).write_bytes(b"linked, and not told to the table yet")
    files.sweep()
    assert files.input_of(batch.id).exists()
    files.database.add_batch(batch)
    files.database.add_result(batch.id, 0, "answer\n", Usage(), good=True)
    keep = files.database.put_batch

    def swept_before(*arguments: object) -> bool:
        files.sweep()
        return keep(*arguments)  # type: ignore[arg-type]  # what it was given

    files.database.put_batch = swept_before  # type: ignore[method-assign,assignment]
    over = finish(files, batch)
    output = files.get(over.output_file_id or "", "me")
    assert files.path_of(output).read_bytes() == b"answer\n"
    files.close()
