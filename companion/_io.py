"""Files that are either the old one or the new one, never half of either."""

import os
import secrets
import shutil
from pathlib import Path


def atomic_write(path, data):
    """Replace the file `path` by the bytes `data` in one step.

    The bytes go to a temporary file in the same folder, reach the disk (fsync), and take the name by
    `os.replace`, which is atomic: whenever the process stops, a reader finds the old file or the new one,
    whole. The new file keeps the permissions of the old; a symbolic link stays, and its target is replaced.

    Raises TypeError if `data` is not bytes-like, and OSError if a write fails: then the old file is
    untouched and the temporary one is gone.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"data must be bytes, got {type(data).__name__}")
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder):
    """Bring the name itself to the disk, where the system can open a folder (Windows cannot)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
