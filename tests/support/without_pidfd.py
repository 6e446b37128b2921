"""Run a module under a seccomp filter that refuses everything about pidfds, as a container's profile may.

Run: `python -m tests.support.without_pidfd EPERM MODULE ARGUMENT...`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final

PR_SET_NO_NEW_PRIVS: Final = 38
PR_SET_SECCOMP: Final = 22
SECCOMP_MODE_FILTER: Final = 2
RETURN_ALLOW: Final = 0x7FFF0000
RETURN_ERRNO: Final = 0x00050000
SO_PEERPIDFD: Final = 77

LOAD, IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of classic BPF
NUMBER_AT, THIRD_ARGUMENT_AT = 0, 32  # in struct seccomp_data

PIDFD_CALLS: Final = {"pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438}  # on every machine
GETSOCKOPT: Final = {"x86_64": 55, "aarch64": 209}


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def instructions(refusal: int) -> list[bytes]:
    """Return the filter: an array of struct sock_filter."""
    allow = len(PIDFD_CALLS) + 4
    refuse = allow + 1
    found: list[bytes] = []

    def add(code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        here = len(found) + 1  # jumps count from the next instruction
        jumps = [target - here if target else 0 for target in (if_true, if_false)]
        found.append(struct.pack("=HBBI", code, *jumps, value))

    add(LOAD, NUMBER_AT)
    for number in PIDFD_CALLS.values():
        add(IF_EQUAL, number, if_true=refuse)
    add(IF_EQUAL, GETSOCKOPT[platform.machine()], if_false=allow)
    add(LOAD, THIRD_ARGUMENT_AT)
    add(IF_EQUAL, SO_PEERPIDFD, if_true=refuse, if_false=allow)
    add(RETURN, RETURN_ALLOW)
    add(RETURN, RETURN_ERRNO | refusal)
    return found


def install(refusal: int) -> None:
    """Put this process, and all that it becomes, under the filter.

    Raises:
        OSError: the kernel does not take it.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    found = instructions(refusal)
    program = Program(len(found), b"".join(found))
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0),
    ):
        if prctl(*arguments):
            raise OSError(ctypes.get_errno(), f"prctl{arguments}")


if __name__ == "__main__":
    install(getattr(errno, sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
