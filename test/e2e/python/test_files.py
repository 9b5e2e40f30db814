import hashlib
import io
import os

import pytest
from e2b import FileType, FilesystemEventType, InvalidArgumentException, NotFoundException

from conftest import eventually


def test_text_and_bytes_are_written_and_read(sandbox):
    info = sandbox.files.write("py/deep/a.txt", "é€𝄞\n")
    assert info.path == "/home/user/py/deep/a.txt"
    assert sandbox.files.read("py/deep/a.txt") == "é€𝄞\n"
    assert bytes(sandbox.files.read("py/deep/a.txt", format="bytes")) == "é€𝄞\n".encode()
    assert b"".join(sandbox.files.read("py/deep/a.txt", format="stream")) == "é€𝄞\n".encode()


def test_50_mb_of_random_bytes_make_the_round_trip(sandbox):
    data = os.urandom(50 << 20)
    digest = hashlib.sha256(data).hexdigest()
    sandbox.files.write("py-big.bin", data)
    assert sandbox.commands.run("sha256sum py-big.bin").stdout.split()[0] == digest
    assert hashlib.sha256(sandbox.files.read("py-big.bin", format="bytes")).hexdigest() == digest
    sandbox.files.remove("py-big.bin")


def test_streams_and_gzip_are_uploaded(sandbox):
    data = os.urandom(3 << 20)
    sandbox.files.write("py-stream.bin", io.BytesIO(data))
    assert bytes(sandbox.files.read("py-stream.bin", format="bytes")) == data
    sandbox.files.write("py-gzip.txt", "again\n" * 100_000, gzip=True)
    assert sandbox.files.read("py-gzip.txt", gzip=True) == "again\n" * 100_000


def test_many_files_are_written_at_once(sandbox):
    infos = sandbox.files.write_files([{"path": f"py-many/{i}", "data": f"file {i}"} for i in range(20)])
    assert [i.path for i in infos] == [f"/home/user/py-many/{i}" for i in range(20)]
    assert sandbox.files.read("py-many/19") == "file 19"


@pytest.mark.parametrize("name", ["with space.txt", "ünïcødé.txt", "文件.txt", "😀 & #?%41.txt"])
def test_names_have_all_kinds_of_letters(sandbox, name):
    assert sandbox.files.write(f"py-names/{name}", name).name == name
    assert sandbox.files.read(f"py-names/{name}") == name
    assert name in [e.name for e in sandbox.files.list("py-names")]


def test_list_goes_to_the_depth_asked_for(sandbox):
    sandbox.commands.run("mkdir -p py-tree/a/b && touch py-tree/top py-tree/a/mid py-tree/a/b/low")

    def names(depth):
        return sorted(e.path.removeprefix("/home/user/py-tree/") for e in sandbox.files.list("py-tree", depth=depth))

    assert names(1) == ["a", "top"]
    assert names(2) == ["a", "a/b", "a/mid", "top"]
    assert names(3) == ["a", "a/b", "a/b/low", "a/mid", "top"]


def test_info_rename_remove_and_exists_agree(sandbox):
    sandbox.files.write("py-one", "12345")
    info = sandbox.files.get_info("py-one")
    assert (info.type, info.size, info.owner, info.permissions) == (FileType.FILE, 5, "user", "-rw-r--r--")
    assert sandbox.files.rename("py-one", "py-two").path == "/home/user/py-two"
    assert not sandbox.files.exists("py-one")
    assert sandbox.files.exists("py-two")
    sandbox.files.remove("py-two")
    assert not sandbox.files.exists("py-two")
    assert sandbox.files.make_dir("py-dir/below") is True
    assert sandbox.files.make_dir("py-dir/below") is False


def test_what_is_missing_or_no_file_is_told_apart(sandbox):
    with pytest.raises(NotFoundException):
        sandbox.files.read("py-missing")
    with pytest.raises(NotFoundException):
        sandbox.files.list("py-missing")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read("/etc")


def test_watcher_reports_what_happens(sandbox):
    sandbox.files.make_dir("py-watched/below")
    watch = sandbox.files.watch_dir("py-watched", recursive=True)
    seen = []

    def saw(kind, name):
        seen.extend((e.type, e.name) for e in watch.get_new_events())
        return (kind, name) in seen

    sandbox.files.write("py-watched/new", "x")
    eventually("create", lambda: saw(FilesystemEventType.CREATE, "new"))
    sandbox.files.write("py-watched/below/deep", "x")
    eventually("create below", lambda: saw(FilesystemEventType.CREATE, "below/deep"))
    sandbox.files.rename("py-watched/new", "py-watched/other")
    eventually("rename", lambda: saw(FilesystemEventType.RENAME, "new"))
    sandbox.files.remove("py-watched/other")
    eventually("remove", lambda: saw(FilesystemEventType.REMOVE, "other"))
    watch.stop()
