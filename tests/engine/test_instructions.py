"""RESTORE.md by itself: its commands, run by bash with stock tools, bring back what a set holds, and nothing of ours helps."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import zstandard

from athena_backup.backup import Expected, close_set, put_component
from athena_backup.instructions import _create_options
from athena_backup.manifest import INSTRUCTIONS, DatabaseFacts, Manifest, Server
from athena_backup.names import SetId
from athena_backup.operation import Operation
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.dump import write_database
from athena_backup.postgres.embedded import EmbeddedServer, binaries
from athena_backup.postgres.sessions import Database, quoted, run_sql, session
from athena_backup.store import read_document
from athena_backup.store.local import LocalStore
from athena_backup.volume_archive import Volume, write_volume
from athena_backup.volume_read import verify_volume

SET = SetId.parse("app/2023-02-02t16-00-00", "app")
NOW = datetime(2023, 2, 2, 16, tzinfo=UTC)
# Stands in for the `zstd` program where the machine has none: the same frames, read by the same library.
_ZSTD = f"""#!{sys.executable}
import shutil, sys, zstandard
assert sys.argv[1:] == ["-dc"]
reader = zstandard.ZstdDecompressor().stream_reader(sys.stdin.buffer, read_across_frames=True)
shutil.copyfileobj(reader, sys.stdout.buffer)
"""


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A PATH on which every stock tool is found."""
    place = tmp_path / "tools"
    place.mkdir()
    (place / "python3").symlink_to(sys.executable)
    if shutil.which("zstd") is None:
        (place / "zstd").write_text(_ZSTD)
        (place / "zstd").chmod(0o755)
    return f"{place}:{binaries()}:{os.environ['PATH']}"


def followed(store: LocalStore, tools: str, server: dict[str, str], volumes: dict[str, Path]) -> str:
    """What is printed when one does what the set's RESTORE.md says, in its folder, in one bash.

    ``server`` and ``volumes``: what a person would fill in.
    """
    text = read_document(store, SET.prefix + INSTRUCTIONS).decode()
    script = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    filled_in = " ".join(f"{name}={value}" for name, value in server.items())
    script, count = re.subn(r"export PGHOST=\S+ PGPORT=\S+ PGUSER=\S+ PGPASSWORD=\S+ ", f"export {filled_in} ", script)
    assert count == (1 if server else 0)
    for name, directory in volumes.items():
        script, count = re.subn(rf"target=/the/directory/of/{name} .*", f"target='{directory}'", script)
        assert count == 1
    ended = subprocess.run(
        ["bash", "-c", script], cwd=Path(store.location.place) / SET.prefix, capture_output=True, text=True,
        env={"PATH": tools, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def seen(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        content: object = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        content = os.readlink(path) if path.is_symlink() else content
        attributes = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        found[str(path.relative_to(root))] = (
            status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_nlink, content, attributes,
        )  # fmt: skip
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="RESTORE.md says: as root")
def test_a_volume_of_three_archives_of_three_parts_each_is_restored_by_restore_md_alone(
    tmp_path: Path, local_store: LocalStore, tools: str
) -> None:
    root = tmp_path / "volume"
    for number in range(3):
        (root / f"folder-{number}" / "inner").mkdir(parents=True)
        for large in range(3):
            place = root / f"folder-{number}" / f"large-{large}"
            place.write_bytes(os.urandom(1 << 20))
            os.chown(place, 1234, 2_500_000)
            place.chmod(0o4750)
            if number == 2:  # all names of one inode, however large, stand in the last archive
                os.link(place, root / f"folder-{large}" / "inner" / "name with\nodd ä\udcff'\"$x")
        (root / f"folder-{number}" / "link").symlink_to("../nowhere")
    for number in range(3):
        os.setxattr(root / f"folder-{number}" / "inner", "user.a", b"\0\xff")
        os.utime(root / f"folder-{number}" / "inner", ns=(1, 1_600_000_000_123_456_789))
        os.utime(root / f"folder-{number}", ns=(1, 1_500_000_000_000_000_001 + number))
    root.chmod(0o2755)
    os.utime(root, ns=(1, 1_400_000_000_000_000_009))
    component = write_volume(
        Volume("gitserver", root), local_store, SET, "run", Operation(),
        large_bytes=1 << 20, archive_bytes=3 << 20, part_limit_bytes=600_000,
    )  # fmt: skip
    assert len(component.streams) == 3
    assert all(len(stream.parts) >= 3 for stream in component.streams)
    verify_volume(component, local_store, Operation())
    put_component(local_store, SET, component)
    outcome = close_set(local_store, SET, [Expected("gitserver", "volume")], [], run_id="run", began=NOW)
    assert isinstance(outcome, Manifest)
    target = tmp_path / "target dir"
    target.mkdir()
    followed(local_store, tools, {}, {"gitserver": target})
    assert seen(target) == seen(root)


@pytest.mark.parametrize("sizes", [{}, {"bulk_bytes": 0, "range_bytes": 500_000}], ids=["dump", "rows-apart"])
@pytest.mark.parametrize("source_version", [180_000, 150_000], ids=["of-today", "of-a-server-without-a-setting"])
@pytest.mark.parametrize("name", ['it\'s "odd" ü', "-dash", "host=nowhere"])
def test_a_database_is_restored_by_restore_md_alone(
    postgres: EmbeddedServer,
    make_database: Callable[..., Database],
    local_store: LocalStore,
    tools: str,
    name: str,
    source_version: int,
    sizes: dict[str, int],
) -> None:
    database = make_database(
        name,
        "CREATE TABLE t AS SELECT i, repeat(md5(i::text), 20) AS v FROM generate_series(1, 5000) AS i;"
        "ALTER TABLE t ADD PRIMARY KEY (i); SELECT lo_from_bytea(4711, 'large');"
        f"ALTER DATABASE {quoted(name)} SET search_path TO public, 'Odd'; COMMENT ON DATABASE {quoted(name)} IS 'ü''s';"
        """CREATE TABLE "odd's ""%"" $x" (at tsvector, "c'" text); INSERT INTO "odd's ""%"" $x" VALUES ('a', E'ü\\t\\\\')""",
    )
    with hold_cut([database], Operation()) as cut:
        component = write_database(
            database,
            cut,
            local_store,
            SET,
            "run",
            Operation(),
            client_directories=[binaries()],
            part_limit_bytes=20_000,
            **sizes,
        )
    assert {stream.table.format for stream in component.streams if stream.table} == (
        {"binary", "text"} if sizes else set()
    )
    assert len(component.parts) >= 3
    assert component.server is not None
    local_store.put(SET.prefix + "globals/0.sql.zst", zstandard.compress(b"CREATE ROLE reader;\n"), if_absent=True)
    older = component.server.model_copy(update={"version": source_version})
    put_component(local_store, SET, component.model_copy(update={"server": older}))
    outcome = close_set(local_store, SET, [Expected(database.name, "database")], [], run_id="run", began=NOW)
    assert isinstance(outcome, Manifest)

    def content() -> tuple[object, ...]:
        with session(postgres.url(name)) as connection:
            sums = run_sql(connection, "SELECT count(*), sum(hashtext(v)) FROM public.t").one()
            odd = run_sql(connection, """SELECT * FROM public."odd's ""%"" $x" """).one()
            return (*sums, *odd, run_sql(connection, "SELECT lo_get(4711)").scalar_one())

    before = content()
    with session(postgres.url()) as connection:
        run_sql(connection, f"DROP DATABASE {quoted(name)} WITH (FORCE)")
    server = {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.port), "PGUSER": "postgres"}
    roles, _, facts = followed(local_store, tools, server, {}).partition("\n")
    assert content() == before
    assert roles == "CREATE ROLE reader;"
    told = json.loads(facts)
    assert (told["database"], told["owner"], told["acl"], told["comment"]) == (name, "postgres", None, "ü's")
    assert told["settings"] == [{"role": None, "name": "search_path", "value": 'public, "Odd"'}]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "UTF8"])
def test_names_of_a_database_in_another_encoding_than_the_page_are_restored_by_it(
    postgres: EmbeddedServer, local_store: LocalStore, tools: str, encoding: str
) -> None:
    with session(postgres.url()) as connection:
        run_sql(
            connection,
            f"CREATE DATABASE other ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
        )
    database = Database("other", postgres.url("other"))
    name = "t" if encoding == "SQL_ASCII" else "täble"
    try:
        with session(database.url) as connection:
            run_sql(connection, f'CREATE TABLE public."{name}" AS SELECT i AS "{name}" FROM generate_series(1, 100) i')
        with hold_cut([database], Operation()) as cut:
            component = write_database(
                *(database, cut, local_store, SET, "run", Operation()), client_directories=[binaries()], bulk_bytes=0
            )
        put_component(local_store, SET, component)
        close_set(local_store, SET, [Expected("other", "database")], [], run_id="run", began=NOW)
        with session(postgres.url()) as connection:
            run_sql(connection, "DROP DATABASE other")
        server = {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.port), "PGUSER": "postgres"}
        followed(local_store, tools, server, {})
        with session(database.url) as connection:
            assert run_sql(connection, f'SELECT sum("{name}") FROM public."{name}"').scalar_one() == 5050
    finally:
        with session(postgres.url()) as connection:
            run_sql(connection, "DROP DATABASE IF EXISTS other WITH (FORCE)")


def test_a_database_with_rules_and_a_tablespace_of_its_own_is_made_with_them() -> None:
    facts = DatabaseFacts.model_construct(
        owner="o", encoding="UTF8", collate="C", ctype="C", locale_provider="i", locale="en", icu_rules="&a < b",
        tablespace="fast disk",
    )  # fmt: skip
    made = _create_options(facts, None)
    assert "--icu-rules='&a < b'" in made
    assert "--tablespace='fast disk'" in made


@pytest.mark.parametrize(("version", "is_named"), [(150_000, True), (140_000, False)])
def test_a_database_of_libc_is_made_so_whatever_the_destination_makes_by_itself(version: int, is_named: bool) -> None:
    """It would sort otherwise without a word; from an older server, createdb may be too old to be told."""
    facts = DatabaseFacts.model_construct(
        owner="o", encoding="UTF8", collate="C", ctype="C", locale_provider="c", locale=None, tablespace="pg_default"
    )
    made = _create_options(facts, Server.model_construct(version=version))
    assert ("--locale-provider=libc" in made) == is_named
