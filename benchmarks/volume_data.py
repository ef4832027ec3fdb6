"""The volumes that are measured, seeded: few large files, half of them incompressible, and many small ones in folders."""

import hashlib
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
_ALPHABET = b"0123456789abcdefghijklmnopqrstuvwxyz"
_FOLDERS = 200


@dataclass(frozen=True)
class LargeFiles:
    """Files of which every second one is text that compresses about 3 to 1, the others noise."""

    files: int
    size_mib: int


@dataclass(frozen=True)
class SmallFiles:
    """Files of up to 8 KB in folders, half of them text."""

    files: int


Volume = LargeFiles | SmallFiles
Fingerprint = dict[str, str]


def build(directory: Path, asked: Volume) -> None:
    """Make the volume if it isn't there; one half made is made anew."""
    if directory.exists():
        return
    making = directory.with_name(directory.name + ".in-the-making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    began = time.perf_counter()
    chance = random.Random(11)
    if isinstance(asked, LargeFiles):
        for number in range(asked.files):
            _large_file(making, number, asked.size_mib, chance)
    else:
        block = _text(chance)
        for number in range(asked.files):
            folder = making / f"folder-{number % _FOLDERS:03}"
            folder.mkdir(exist_ok=True)
            size, start = chance.randrange(512, 8192), chance.randrange(MIB - 8192)
            data = chance.randbytes(size) if number % 2 else _changed(block[start : start + size], chance)
            (folder / f"file-{number:05}").write_bytes(data)
    making.rename(directory)
    print(f"  {asked} made in {time.perf_counter() - began:.0f} s", flush=True)


def _large_file(directory: Path, number: int, size_mib: int, chance: random.Random) -> None:
    block = _text(chance)
    with (directory / (f"noise-{number}.bin" if number % 2 else f"service-{number}.log")).open("wb") as file:
        for _ in range(size_mib):
            file.write(chance.randbytes(MIB) if number % 2 else _changed(block, chance))


def _changed(block: bytes, chance: random.Random) -> bytes:
    """The block with its letters and digits exchanged: as compressible, and no repetition for those who look for them."""
    letters = list(_ALPHABET)
    chance.shuffle(letters)
    return block.translate(bytes.maketrans(_ALPHABET, bytes(letters)))


def _text(chance: random.Random) -> bytes:
    """A MiB of log lines."""
    lines: list[str] = []
    size = 0
    while size < MIB:
        line = (
            f"2026-11-{chance.randrange(1, 31):02} {chance.randrange(24):02}:{chance.randrange(60):02}:"
            f"{chance.randrange(60):02}.{chance.randrange(1000):03} {chance.choice(('info', 'warn', 'debug'))}"
            f" {chance.choice(('gateway', 'billing', 'search', 'login'))} request={chance.getrandbits(64):016x}"
            f" user={chance.randrange(100_000)} took={chance.randrange(9_000)}ms"
            f" path=/{chance.choice(('items', 'orders', 'users', 'reports'))}/{chance.getrandbits(32):08x}\n"
        )
        lines.append(line)
        size += len(line)
    return "".join(lines).encode()[:MIB]


def fingerprint(directory: Path) -> Fingerprint:
    """Every file's hash by its path; of other things only that they are there."""
    found: Fingerprint = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder) / name
            with path.open("rb") as file:
                found[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
