"""Mounts that nobody else sees and that end with their test."""

import ctypes
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

_CLONE_NEWNS = 0x00020000


def in_own_mounts(work: Callable[[], None]) -> None:
    """Run ``work`` in a child with a mount namespace of its own (unshare(2)); skips the test where there may be none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        told = b""
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
                raise pytest.skip.Exception("no mount namespace here")
            mount("--make-rprivate", "/")
            work()
        except pytest.skip.Exception as skipped:
            told = b"skip " + str(skipped).encode()
        except BaseException:  # noqa: BLE001 - it is told to the parent, where it fails the test
            told = traceback.format_exc().encode()
        os.write(writer, told)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        outcome = pipe.read().decode()
    os.waitpid(child, 0)
    if outcome.startswith("skip "):
        pytest.skip(outcome.removeprefix("skip "))
    assert not outcome, outcome


def mount(*arguments: str | Path) -> None:
    mounted = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if mounted.returncode != 0:
        raise pytest.skip.Exception(f"no mounting here: {mounted.stderr}")


def tmpfs(place: Path, options: str) -> Path:
    place.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", options, "none", place)
    return place
