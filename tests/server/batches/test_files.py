"""The store of files: what is being written is left alone, and nothing passes its bounds."""

from pathlib import Path

import pytest

from manylora.adapters.errors import StoreFull
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


def test_uploads_at_once_share_what_room_there_is(tmp_path: Path) -> None:
    files = FileStore(tmp_path, largest=100, most=100)
    one, two = files.new(), files.new()
    one.write(b"x" * 60)
    with pytest.raises(StoreFull, match="files-gib"):
        two.write(b"x" * 60)
    two.discard()
    two.discard()
    kept = files.add(one, "me", "x", "batch")
    three = files.new()
    three.write(b"x" * 40)
    with pytest.raises(StoreFull):
        three.write(b"x")
    three.discard()
    four = files.new()
    files.delete(kept.id, "me")
    four.write(b"x" * 100)
    assert files.add(four, "me", "x", "batch").nbytes == 100
    files.close()


def test_one_tenant_leaves_room_for_others(tmp_path: Path) -> None:
    files = FileStore(tmp_path, largest=100, most=100)
    one = files.new("acme")
    one.write(b"x" * 30)
    kept = files.add(one, "acme", "x", "batch")
    files.take_input(kept, "batch_1")
    files.database.add_batch(Batch("batch_1", "acme", "key", "/v1/completions", kept.id, 0, 0))
    files.delete(kept.id, "acme")
    two = files.new("acme")
    two.write(b"x" * 20)
    with pytest.raises(StoreFull, match="one tenant"):
        two.write(b"x")
    other = files.new("globex")
    other.write(b"x" * 50)
    files.drop_input("batch_1")
    last = files.new("globex")
    with pytest.raises(StoreFull, match="one tenant"):
        last.write(b"x")
    two.write(b"x" * 30)
    operators = files.new()
    with pytest.raises(StoreFull, match="at their limit"):
        operators.write(b"x")
    for each in (two, other, last, operators):
        each.discard()
    files.close()


def test_what_a_batch_reads_is_counted_after_its_file_is_deleted(tmp_path: Path) -> None:
    files = FileStore(tmp_path, largest=100, most=100)
    incoming = files.new()
    incoming.write(b"x" * 60)
    kept = files.add(incoming, "me", "x", "batch")
    for batch in ("batch_1", "batch_2"):
        files.take_input(kept, batch)
    other = files.new()
    other.write(b"x" * 40)
    files.delete(kept.id, "me")
    files.drop_input("batch_1")
    late = files.new()
    with pytest.raises(StoreFull):
        late.write(b"x")
    files.drop_input("batch_2")
    late.write(b"x")
    late.discard()
    other.discard()
    files.close()


def test_two_links_to_one_deleted_file_are_counted_once(tmp_path: Path) -> None:
    files = FileStore(tmp_path, largest=100, most=100)
    incoming = files.new()
    incoming.write(b"x" * 60)
    kept = files.add(incoming, "me", "x", "batch")
    for batch in ("batch_1", "batch_2"):
        files.take_input(kept, batch)
    files.delete(kept.id, "me")
    late = files.new()
    late.write(b"x" * 40)
    with pytest.raises(StoreFull):
        late.write(b"x")
    late.discard()
    files.close()


def test_a_file_that_is_kept_is_not_discarded_by_who_hangs_up(tmp_path: Path) -> None:
    files = FileStore(tmp_path, largest=100, most=100)
    incoming = files.new()
    incoming.write(b"whole")
    kept = files.add(incoming, "me", "x", "batch")
    incoming.discard()
    assert files.path_of(files.get(kept.id, "me")).read_bytes() == b"whole"
    files.close()


def test_files_whose_time_is_over_take_no_place_in_a_page(tmp_path: Path) -> None:
    files = FileStore(tmp_path, largest=100, most=1000)
    made = [files.add(files.new(), "me", "x", "batch", expires).id for expires in (None, None, 5, 5, None)]
    page = files.list("me", None, None, 2, ascending=False)
    assert [file.id for file in page] == [made[4], made[1]]
    files.close()
