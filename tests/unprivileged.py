"""What happens to somebody who is not root."""

import os
from collections.abc import Callable
from pathlib import Path

from athena_backup.errors import AthenaError

NOBODY = 65534


def as_user(act: Callable[[], object], place: Path, uid: int = NOBODY) -> str:
    """Run ``act`` in a child of that user, who may come to ``place``; what it returned or raised, in words."""
    for folder in (place, *place.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            said = repr(act())
        except AthenaError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001 - nothing else may go on as a second run of the tests
            said = repr(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said
