"""Who owns a spool folder, and under which identity its events are numbered.

A source is ``name/epoch``. The epoch is drawn when the folder is new, so a lost or copied folder, or a second instance
that took the same name, never gives a number to a second event: its numbers start at 1 under another source. It is
drawn again when the machine went down without a clean close, since the last numbers used may not have reached the disk.
"""

import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.producer.errors import SpoolError, SpoolInUse, SpoolMismatch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Identity:
    """What ``identity.json`` says."""

    name: str
    epoch: str
    topic: str
    #: The machine's boot while the folder is in use; empty after a clean close.
    boot: str
    #: Of the folder; another one means that the folder is a copy.
    inode: int
    #: Registry's ids of the event schema by ``url#schema hash``: a restart needs no registry.
    schema_ids: dict[str, int]

    @property
    def source(self) -> str:
        return f"{self.name}/{self.epoch}"


class Spool:
    """A locked spool folder. Raises SpoolInUse, SpoolMismatch, or SpoolError when it cannot be used."""

    def __init__(self, folder: Path, name: str, topic: str) -> None:
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SpoolError(f"cannot use the spool {folder}: {error}") from error
        try:
            self._take_lock()
            self.identity = self._identify(name, topic)
            self._save()
        except OSError as error:
            os.close(self._lock)
            raise SpoolError(f"cannot use the spool {folder}: {error}") from error
        except SpoolError:
            os.close(self._lock)
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise SpoolInUse(
                f"the spool {self.folder} is in use by process {holder}: give every producer its own spool_dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _identify(self, name: str, topic: str) -> Identity:
        boot, inode = _boot_id(), self.folder.stat().st_ino
        try:
            found = Identity(**json.loads((self.folder / "identity.json").read_text()))
        except FileNotFoundError:
            return Identity(name, _new_epoch(), topic, boot, inode, {})
        except (ValueError, TypeError) as error:
            raise SpoolError(f"{self.folder / 'identity.json'} cannot be read ({error}): move it away") from error
        if (found.name, found.topic) != (name, topic):
            raise SpoolMismatch(
                f"the spool {self.folder} holds events of {found.name} for {found.topic}, expected {name} for {topic}: "
                "give every source and topic its own spool_dir"
            )
        same_numbers = found.inode == inode and found.boot in ("", boot)
        return replace(found, epoch=found.epoch if same_numbers else _new_epoch(), boot=boot, inode=inode)

    def _save(self) -> None:
        write_atomically(self.folder / "identity.json", json.dumps(asdict(self.identity), indent=2) + "\n")

    def remember_schema(self, key: str, schema_id: int) -> None:
        self.identity = replace(self.identity, schema_ids={**self.identity.schema_ids, key: schema_id})
        self._save()

    def close(self) -> None:
        """Give the folder up; the numbers on disk are complete."""
        self.identity = replace(self.identity, boot="")
        self._save()
        os.close(self._lock)

    def abandon(self) -> None:
        """Give the folder up with its identity as in use: in a child of fork, or after a failed start."""
        os.close(self._lock)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a crash leaves the old or the new one, on disk before this returns."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _new_epoch() -> str:
    return secrets.token_hex(6)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # no such file off Linux: every unclean start draws a new epoch
        return f"unknown-{secrets.token_hex(8)}"
