"""Become another program that cannot outlive its parent: ``python -I -S launch.py PARENT SIGNAL USER PROGRAM [ARG…]``.

USER is empty, the name of a system user to run as, or ``=NAME``: look like NAME to the program, but be who we are.

A step of its own between fork and exec, because the parent may have threads (no Python may run in its forked child) and
because the order matters. Run by path; imports nothing of Tally's, so it costs about 20 ms.
"""

import ctypes
import os
import pwd
import sys

_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 1, 8, 47, 2
_CAP_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWUSER = 0x10000000


def main() -> None:
    parent, signal_number, user, *program = sys.argv[1:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if user.startswith("="):
            _look_like(libc, user[1:])
        elif user:
            _become(libc, user)
        # After the change of user, which would clear it.
        _check(libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0))
    if os.getppid() != int(parent):
        sys.exit("the parent ended before its child began")
    os.execv(program[0], program)


def _look_like(libc: ctypes.CDLL, user: str) -> None:
    """Enter a user namespace in which we have the name and number of ``user``, and outside which we stay who we are.

    PostgreSQL refuses to run as root. This way it sees another user, while files stay root's: closed directories are
    open to it as to their owner, and no permission on the machine changes. Containers may forbid it.
    """
    entry = pwd.getpwnam(user)
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(_CLONE_NEWUSER))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{entry.pw_uid} {uid} 1"),
        ("gid_map", f"{entry.pw_gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123  pathlib would double what this costs
            file.write(text)


def _become(libc: ctypes.CDLL, user: str) -> None:
    """Run as ``user``, keeping root's way through closed directories.

    PostgreSQL refuses to run as root, and a home directory or temporary directory of root's is closed to anyone else.
    Keeping one capability leaves every permission on the machine as it was. It is permitted and ambient, nothing more,
    so exec does not count as privileged and the libraries beside the binary are still found.
    """
    entry = pwd.getpwnam(user)
    _check(libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    mask = 1 << _CAP_DAC_OVERRIDE
    effective_permitted_inheritable = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
    _check(libc.capset(header, effective_permitted_inheritable))
    _check(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        sys.exit(f"cannot prepare the process: {os.strerror(error)}; run as another user than root")


if __name__ == "__main__":
    main()
