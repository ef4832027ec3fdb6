"""Volumes that hold the store, or one another, by a path that does not say so."""

import os
from pathlib import Path

import pytest
from own_mounts import in_own_mounts, mount, tmpfs

from athena_backup.mounts import Mount, origin, parse
from athena_backup.settings import Settings
from deployments import checkup
from deployments.checkup import overlaps

by_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


def settings(home: Path, **volumes: Path) -> Settings:
    return Settings(athena_home=home, athena_volumes=volumes)


@by_root
def test_a_folder_of_a_volume_that_is_mounted_elsewhere_is_no_place_for_the_store(tmp_path: Path) -> None:
    """As by ``subPath`` of one disk: the backup would hold itself, and a restore would remove every set."""

    def work() -> None:
        disk = tmpfs(tmp_path / "disk with a space", "size=1m")
        for folder in ("repos/backups", "beside"):
            (disk / folder).mkdir(parents=True)
        inside, beside = tmp_path / "inside", tmp_path / "beside"
        for place, folder in ((inside, "repos/backups"), (beside, "beside")):
            place.mkdir()
            mount("--bind", disk / folder, place)
        own = settings(tmp_path / "home", repos=disk / "repos")
        assert overlaps(own, str(beside)) == []
        [found] = overlaps(own, str(inside))
        assert found.startswith("volume repos and the store lie in one another")
        found = " ".join(overlaps(settings(inside / "home", repos=disk / "repos"), str(tmp_path / "store")))
        assert "volume repos and ATHENA_HOME lie in one another" in found

    in_own_mounts(work)


def test_two_folders_of_one_nfs_export_are_two_and_one_in_the_other_is_seen(tmp_path: Path) -> None:
    """Every mount of NFS shows its folder as the root of its file system, and those of one server share its number."""
    line = "36 35 0:52 / {} rw,relatime shared:1 - nfs4 nas:/export/{} rw,vers=4.2"
    seen = [parse(line.format(place, folder).encode()) for place, folder in (("/a", "a"), ("/b", "b"), ("/in", "a/in"))]
    assert origin(Path("/a/x"), seen) == ("0:52", Path("/export/a/x"))
    assert origin(Path("/b"), seen) == ("0:52", Path("/export/b"))
    assert origin(Path("/in"), seen) == ("0:52", Path("/export/a/in"))


def test_what_a_list_of_mounts_says_is_not_believed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may show each of its folders as its root, as NFS does."""
    volumes = {name: tmp_path / name for name in ("one", "two")}
    for place in volumes.values():
        place.mkdir()
    monkeypatch.setattr(checkup, "mounts", lambda: [Mount("0:52", "/", str(place)) for place in volumes.values()])
    assert overlaps(settings(tmp_path / "home", **volumes), None) == []


@pytest.mark.parametrize(
    ("inner", "outer", "is_one"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_only_of_two_places_that_are_both_yet_to_be_made_is_a_list_of_mounts_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: bool, outer: bool, is_one: bool
) -> None:
    volume, mounted = tmp_path / "volume", tmp_path / "mounted"
    for place, is_there in ((volume / "folder", inner), (mounted, outer)):
        place.parent.mkdir(exist_ok=True)
        if is_there:
            place.mkdir()
    seen = [Mount("0:52", "/", str(volume)), Mount("0:52", "/folder", str(mounted))]
    monkeypatch.setattr(checkup, "mounts", lambda: seen)
    assert bool(overlaps(settings(tmp_path / "home", one=volume, two=mounted), None)) is is_one


@by_root
def test_one_folder_is_no_two_volumes_by_whatever_paths(tmp_path: Path) -> None:
    def work() -> None:
        disk = tmpfs(tmp_path / "disk", "size=1m")
        again = tmp_path / "again"
        again.mkdir()
        mount("--bind", disk, again)
        [found] = overlaps(settings(tmp_path / "home", one=disk, two=again), None)
        assert found.startswith("volume one and volume two lie in one another")

    in_own_mounts(work)
