"""Files are whole or not there: on a real disk that is full, in a process that may write no more, after a crash."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.documents.files import NotWritten, file_name, write
from tests.documents import samples

ROOT = Path(__file__).parents[2]


def test_a_file_is_written_once_and_left_alone_when_nothing_changed(tmp_path: Path) -> None:
    path = tmp_path / "2026" / "a.pdf"
    assert write(path, b"one") is True
    before = path.stat().st_mtime_ns
    assert write(path, b"one") is False
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (b"one", before)
    assert write(path, b"two") is True
    assert (path.read_bytes(), [one.name for one in path.parent.iterdir()]) == (b"two", ["a.pdf"])


def test_names_of_files_stay_in_their_folder() -> None:
    names = {"../RE 2026/17": "__RE_2026_17.pdf", ".hidden": "_hidden.pdf", "TD-2026-00001": "TD-2026-00001.pdf"}
    for number, name in names.items():
        assert file_name(samples.document([], number=number), "pdf") == name
    assert file_name(samples.yen(), "json") == "draft-17.json"


WRITES = """
import sys
from pathlib import Path
from pipeline.documents.files import NotWritten, write
path = Path(sys.argv[1])
try:
    write(path, b"n" * 4_000_000)
except NotWritten as error:
    print(error)
"""


def run_write(path: Path, *before: str, preamble: str = "") -> str:
    done = subprocess.run(
        [*before, sys.executable, "-c", preamble + WRITES, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_write_that_is_cut_short_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(b"old")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    said = run_write(path, preamble=limited)
    assert said == f"{path} is not written: File too large. Make room and run it again, it goes on\n"
    assert (path.read_bytes(), [one.name for one in tmp_path.iterdir()]) == (b"old", ["a.pdf"])


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*own_mounts, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a small disk of his own; the test before this one ran")
    mounted = (
        f'mount -t tmpfs -o size=1m small "{tmp_path}" && echo old > "{tmp_path}/a.pdf" && "$@" && '
        f'cat "{tmp_path}/a.pdf" && ls -A "{tmp_path}"'
    )
    said = run_write(tmp_path / "a.pdf", *own_mounts, "sh", "-c", mounted, "sh")
    lines = said.splitlines()
    assert (
        lines[0] == f"{tmp_path}/a.pdf is not written: No space left on device. Make room and run it again, it goes on"
    )
    assert lines[1:] == ["old", "a.pdf"]


def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritten, match=r"file/a\.pdf is not written: File exists"):
        write(tmp_path / "file" / "a.pdf", b"x")
