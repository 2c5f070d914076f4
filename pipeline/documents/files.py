"""Documents on disk: a file is there whole or not at all, and writing it again changes nothing."""

import contextlib
import os
import re
from pathlib import Path

from pipeline.documents.model import Document

#: What may not stand in a file's name on some system, and what would hide the file.
_UNSAFE = re.compile(r"[^\w.()+-]|^\.+")


class NotWritten(Exception):
    """A document was not written: which file and why. What stood there before is untouched."""


def title(document: Document) -> str:
    """What a document's files are named by: its number, a draft by its id."""
    return document.number or f"draft-{document.id}"


def file_name(document: Document, ending: str) -> str:
    """A file's name by the document's title, ``2026/17`` as ``2026_17.pdf``."""
    return f"{_UNSAFE.sub('_', title(document))}.{ending}"


def write(path: Path, content: bytes) -> bool:
    """Write a file whole, and its folder where it is missing; whether it changed. The same again is not written.

    First under another name, then renamed, both on disk before this returns: a crash at any point leaves the old file
    or the new one. Raises NotWritten, for a full disk too, and takes back what it had written by then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.exists() and path.read_bytes() == content:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise NotWritten(f"{path} is not written: {error.strerror}. Make room and run it again, it goes on") from error
    return True


def _sync_folder(folder: Path) -> None:
    """Put the new name on disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
