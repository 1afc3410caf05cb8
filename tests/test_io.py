"""A file written by `atomic_write` is the old one or the new one, wherever the writing stops."""

import builtins
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from companion._io import atomic_write

OLD, NEW = b"the old file", b"the new file, which is longer"


class Interrupted(Exception):
    """Stands for whatever ends a write: a full disk, a signal."""


class _ShortFile:
    """A file that takes `room` bytes and then fails, as on a full disk."""

    def __init__(self, path, mode, room):
        self.file, self.room = builtins.open(path, mode, buffering=0), room  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: self.room])
        raise Interrupted


def test_replaces_and_creates(tmp_path):
    path = tmp_path / "file"
    for data in (OLD, NEW, bytearray(b""), memoryview(b"\x00\xff" * 70_000)):
        atomic_write(path, data)
        assert path.read_bytes() == bytes(data)
    assert os.listdir(tmp_path) == ["file"]


@settings(deadline=None)
@given(room=st.integers(0, len(NEW)))
def test_a_write_stopped_at_any_byte_leaves_the_old_file(tmp_path_factory, room):
    path = tmp_path_factory.mktemp("io") / "file"
    path.write_bytes(OLD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("companion._io.open", lambda path, mode: _ShortFile(path, mode, room), raising=False)
        with pytest.raises(Interrupted):
            atomic_write(path, NEW)
    assert path.read_bytes() == OLD
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_before_the_new_name_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    def fail(*_):
        raise error

    path = tmp_path / "file"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(error):
        atomic_write(path, NEW)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_killed_process_leaves_the_old_file(tmp_path, step):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    code = (
        "import os, sys; from companion._io import atomic_write;"
        f"os.{step} = lambda *_: os._exit(9); atomic_write(sys.argv[1], {NEW!r})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert path.read_bytes() == OLD
    atomic_write(path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.skipif(os.name != "posix", reason="permission bits and links as POSIX has them")
def test_keeps_permissions_and_links(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(OLD)
    path.chmod(0o640)
    link.symlink_to(path)
    atomic_write(link, NEW)
    assert link.is_symlink() and path.read_bytes() == NEW
    assert path.stat().st_mode & 0o777 == 0o640


def test_refuses_text_and_a_missing_folder(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(TypeError, match="data must be bytes, got str"):
        atomic_write(path, "text")
    with pytest.raises(OSError):
        atomic_write(tmp_path / "missing" / "file", NEW)
    assert os.listdir(tmp_path) == []
