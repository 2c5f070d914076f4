"""Copies of a partition's state on a disk that outlives the worker's, so that a lost one is not read for 35 days.

Segments never change, so a copy takes only those that came since the last one, and a manifest that names all. It is
made in a thread of its own, off the way of batches. A copy equals a committed state at its positions; whoever uses it
reads the changelogs from there. It is no truth: one that is damaged, or of another cluster or topics, is passed over.

Workers may copy at the same time (one that has just lost the partition): names hold checksums, so files do not mix, the
last manifest counts, and either is as good. Files that no manifest names are deleted when they are an hour old.
"""

import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path

from pipeline.infra.logs import get_logger
from pipeline.rating.manifest import Manifest
from pipeline.rating.segments import Damaged, Described, verify

log = get_logger(__name__)

_STRAY_S = 3600.0
_COPY_BYTES = 1024 * 1024
#: A thread that copies is given this long to end; it holds nothing that others need.
_STOP_S = 5.0


class Snapshots:
    """The copy of one partition's state."""

    def __init__(self, directory: Path, interval_s: float) -> None:
        self._directory, self._interval_s = directory, interval_s
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._due_at = 0.0
        #: Names of the files of the copy that are known to be good.
        self._good: set[str] = set()

    @property
    def due(self) -> bool:
        """Is it time for a new one, and the last one done?"""
        return time.monotonic() >= self._due_at and not (self._thread and self._thread.is_alive())

    def start(self, manifest: Manifest, source: Path) -> None:
        """Copy the files that the manifest names, which may be deleted meanwhile. Raises OSError if one is gone."""
        self._due_at = time.monotonic() + self._interval_s
        files = [(described, (source / described.name).open("rb", 0)) for _, described in manifest.segments]
        self._thread = threading.Thread(target=self._run, args=(manifest, files), name="snapshot", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give up the copy under way."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(_STOP_S)

    def fetch(self, stamp: Mapping[str, str], into: Path) -> Manifest | None:
        """Copy the state back, unverified; None when there is none of this stamp. Raises OSError, Damaged."""
        manifest = Manifest.read(self._directory)
        if manifest is None:
            return None
        if manifest.stamp != stamp:
            log.warning("snapshot_foreign", path=str(self._directory), found=manifest.stamp, expected=stamp)
            return None
        for listed in manifest.segments:
            shutil.copyfile(self._directory / listed.segment.name, into / listed.segment.name)
        return manifest

    def _run(self, manifest: Manifest, files: Sequence[tuple[Described, FileIO]]) -> None:
        started = time.monotonic()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            copied = sum(self._copy(described, file) for described, file in files)
            if self._stopping.is_set():
                return
            manifest.write(self._directory, sync=True)
            self._delete_strays(manifest)
        except OSError as error:
            # The worker goes on without: the changelogs hold everything.
            log.warning("snapshot_failed", path=str(self._directory), error=str(error), then="tried again later")
        else:
            seconds = round(time.monotonic() - started, 3)
            log.info("snapshot_written", path=str(self._directory), copied_bytes=copied, seconds=seconds)
        finally:
            for _, file in files:
                file.close()

    def _copy(self, described: Described, file: FileIO) -> int:
        """Bytes copied: none where the file is there already, and good."""
        if self._is_good(described):
            return 0
        new = self._directory / f"{described.name}.new-{secrets.token_hex(4)}"
        with new.open("wb", buffering=0) as copy:
            while (chunk := file.read(_COPY_BYTES)) and not self._stopping.is_set():
                left = memoryview(chunk)
                while left:
                    left = left[copy.write(left) :]
            os.fsync(copy.fileno())
        if self._stopping.is_set():
            new.unlink()
            return 0
        new.replace(self._directory / described.name)
        self._good.add(described.name)
        return file.tell()

    def _is_good(self, described: Described) -> bool:
        if described.name not in self._good:
            try:
                verify(self._directory, described)
            except (OSError, Damaged):
                return False
            self._good.add(described.name)
        return True

    def _delete_strays(self, manifest: Manifest) -> None:
        for path in self._directory.iterdir():
            if path.name not in manifest.files and time.time() - path.stat().st_mtime > _STRAY_S:
                path.unlink(missing_ok=True)
