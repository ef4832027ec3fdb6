"""The peers for volumes: `tar | zstd`, restic, borg, and rclone's copy of every file to S3."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import volume_data
from benchmarks.contenders import Contender, Place, ShellPeer, compare, nothing
from benchmarks.measuring import Meter

TAR_1, TAR_3 = "tar | zstd -T2 -1", "tar | zstd -T2"
RESTIC, BORG, RCLONE = "restic", "borg zstd,1", "rclone copy (S3)"


def volume_peers(place: Place, volume: Path, before: volume_data.Fingerprint) -> Sequence[Contender]:
    """Those whose programs are there."""
    output, target = place.work / "archive", place.work / "extracted"

    def peer(
        name: str, backup: str, back: str, prepare: Callable[[], None] = nothing, where: Path | None = output
    ) -> ShellPeer:
        def before_backup() -> None:
            place.fresh(output.name)
            prepare()

        def before_restore() -> None:
            place.fresh(target.name)

        return ShellPeer(
            name,
            place,
            Meter(None, () if where else (place.bucket.server.pid,)),
            backup,
            back,
            where,
            check=lambda: compare(name, before, volume_data.fingerprint(target / volume.name)),
            before_backup=before_backup,
            before_restore=before_restore,
            clean=partial(shutil.rmtree, target, ignore_errors=True),
        )

    def initialize(command: str) -> None:
        subprocess.run(command.split(), check=True, env=place.environment, stdout=subprocess.DEVNULL)

    files = f"tar -C {volume.parent} -cf - {volume.name}"
    extract = f"zstd -dc -q {output}/it.tar.zst | tar -x -C {target}"
    found: list[Contender] = [
        peer(TAR_1, f"{files} | zstd -T2 -1 -q -o {output}/it.tar.zst", extract),
        peer(TAR_3, f"{files} | zstd -T2 -q -o {output}/it.tar.zst", extract),
    ]
    if place.tools.has("restic"):
        restic = f"restic -q -r {output}"
        found.append(
            peer(
                RESTIC,
                f"cd {volume.parent} && {restic} backup {volume.name}",
                f"{restic} restore latest --target {target}",
                partial(initialize, f"{restic} init"),
            )
        )
    if place.tools.has("borg"):
        found.append(
            peer(
                BORG,
                f"cd {volume.parent} && borg create --compression zstd,1 {output}::it {volume.name}",
                f"cd {target} && borg extract {output}::it",
                partial(initialize, f"borg init --encryption=none {output}"),
            )
        )
    remote = place.remote("files")
    found.append(
        peer(
            RCLONE,
            f"{place.tools.rclone} copy {volume} {remote}",
            f"{place.tools.rclone} copy {remote} {target}/{volume.name}",
            where=None,
        )
    )
    return found
