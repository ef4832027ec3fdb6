"""What no dump of one database holds is in the manifest, whole, and an ordinary owner may read it."""

import threading
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest

from athena_backup.errors import CancelledError, FinalError
from athena_backup.manifest import DatabaseFacts
from athena_backup.operation import Operation
from athena_backup.postgres import facts
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.embedded import EmbeddedServer, binaries
from athena_backup.postgres.facts import read_facts, tables_with_rows
from athena_backup.postgres.held import Held
from athena_backup.postgres.sessions import Database


@pytest.fixture
def names() -> dict[str, str]:
    tag = uuid4().hex[:8]
    return {role: f"{role}_{tag}" for role in ("owner", "grantee", "setter", "parent", "stranger", "db")}


@pytest.fixture
def database(postgres: EmbeddedServer, names: dict[str, str]) -> Iterator[str]:
    name = names["db"]
    with psycopg.connect(host="127.0.0.1", port=postgres.port, user="postgres", autocommit=True) as admin:
        for role in ("owner", "grantee", "setter", "parent", "stranger"):
            admin.execute(f"CREATE ROLE {names[role]} {'LOGIN' if role == 'owner' else 'CREATEDB CONNECTION LIMIT 3'}")
        admin.execute(f"GRANT {names['parent']} TO {names['grantee']}")
        admin.execute(f"CREATE DATABASE {name} OWNER {names['owner']} CONNECTION LIMIT 17 TEMPLATE template0")
        admin.execute(f"COMMENT ON DATABASE {name} IS 'a ''comment'''")
        admin.execute(f"GRANT TEMPORARY ON DATABASE {name} TO {names['grantee']} WITH GRANT OPTION")
        admin.execute(f"ALTER DATABASE {name} SET work_mem = '5MB'")
        admin.execute(f"ALTER ROLE {names['setter']} IN DATABASE {name} SET search_path = 'a', \"b c\"")
        with psycopg.connect(host="127.0.0.1", port=postgres.port, user="postgres", dbname=name) as inside:
            inside.execute(f"CREATE TABLE t AS SELECT generate_series(1, 7) i; GRANT SELECT ON t TO {names['parent']}")
            inside.execute(f"GRANT SELECT ON t TO {names['owner']}")
            inside.execute("CREATE EXTENSION hstore; SELECT lo_create(0), lo_create(0)")
        yield name
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        for role in ("owner", "grantee", "setter", "parent", "stranger"):
            admin.execute(f"DROP ROLE {names[role]}")


def facts_of(held: Held, operation: Operation) -> DatabaseFacts:
    return read_facts(held, operation, binaries() / "pg_dump", tables_with_rows(held, operation))


def read(database: Database) -> DatabaseFacts:
    with hold_cut([database], Operation()) as cut:
        return facts_of(cut.of(database.name), Operation())


def test_an_ordinary_owner_reads_everything_that_hangs_on_the_database(
    postgres: EmbeddedServer, database: str, names: dict[str, str]
) -> None:
    found = read(Database("one", postgres.url(database, user=names["owner"])))
    assert (found.owner, found.comment, found.connection_limit) == (names["owner"], "a 'comment'", 17)
    assert (found.tablespace, found.encoding, found.locale_provider) == ("pg_default", "UTF8", "c")
    assert found.collate == found.ctype == "C.UTF-8"
    assert found.acl is not None
    assert f"{names['grantee']}=T*/{names['owner']}" in found.acl
    assert [(one.role, one.name, one.value) for one in found.settings] == [
        (None, "work_mem", "5MB"),
        (names["setter"], "search_path", 'a, "b c"'),
    ]
    assert {(one.name) for one in found.extensions} == {"hstore", "plpgsql"}
    assert found.large_objects == 2
    assert [(one.schema_name, one.name, one.rows) for one in found.tables] == [("public", "t", 7)]
    assert found.size_bytes > 1 << 20


def test_every_role_that_something_in_the_database_names_is_there_and_no_other(
    postgres: EmbeddedServer, database: str, names: dict[str, str]
) -> None:
    found = {role.name: role for role in read(Database("one", postgres.url(database))).roles}
    ours = {role for role in found if role in names.values()}
    assert ours == {names[role] for role in ("owner", "grantee", "setter", "parent")}
    assert found[names["grantee"]].member_of == (names["parent"],)
    assert (found[names["owner"]].can_login, found[names["owner"]].create_database) == (True, False)
    grantee = found[names["grantee"]]
    assert (grantee.can_login, grantee.create_database, grantee.connection_limit) == (False, True, 3)
    # The bootstrap superuser owns t; the server tracks its dependencies nowhere.
    assert "postgres" in found


@pytest.mark.parametrize(
    "named",
    [
        "ALTER DEFAULT PRIVILEGES FOR ROLE postgres IN SCHEMA public GRANT SELECT ON TABLES TO {grantee}",
        "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public GRANT SELECT ON TABLES TO postgres",
        "CREATE STATISTICS stats ON a, b FROM own; ALTER STATISTICS stats OWNER TO postgres",
        "GRANT SELECT ON own TO postgres",
        "GRANT SELECT (a) ON own TO postgres",
        "CREATE POLICY policy ON own TO postgres",
        "CREATE CONVERSION public.there FOR 'LATIN1' TO 'UTF8' FROM iso8859_1_to_utf8",
        "CREATE OPERATOR FAMILY family USING btree",
        "ALTER SCHEMA public OWNER TO postgres",
        "GRANT CREATE ON SCHEMA public TO postgres",
        "",
    ],
)
def test_the_bootstrap_superuser_is_among_the_roles_where_something_names_it(
    postgres: EmbeddedServer, names: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server tracks nothing of it, and at the destination it may have another name."""
    name, owner, grantee = names["db"], names["owner"], names["grantee"]
    with psycopg.connect(host="127.0.0.1", port=postgres.port, user="postgres", autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {owner} LOGIN")
        admin.execute(f"CREATE ROLE {grantee}")
        admin.execute(f"CREATE DATABASE {name} OWNER {owner} TEMPLATE template0")
        try:
            with psycopg.connect(host="127.0.0.1", port=postgres.port, user="postgres", dbname=name) as inside:
                inside.execute(f"CREATE TABLE own (a int, b int); ALTER TABLE own OWNER TO {owner}")
                inside.execute("CREATE EXTENSION pg_stat_statements")  # which grants, and whose rights are in no dump
                inside.execute(named.format(owner=owner, grantee=grantee) or "SELECT")
            found = {role.name for role in read(Database("one", postgres.url(name))).roles}
            assert ("postgres" in found) == bool(named)
            if named.startswith("ALTER SCHEMA public"):
                # Of a server of 14 every public is so, and that version's pg_dump does not write it.
                monkeypatch.setattr(facts, "client_version", lambda _: 140_000)
                assert "postgres" not in {role.name for role in read(Database("one", postgres.url(name))).roles}
                with psycopg.connect(host="127.0.0.1", port=postgres.port, user="postgres", dbname=name) as inside:
                    inside.execute(f"ALTER SCHEMA public OWNER TO {owner}")
                # It writes that the bootstrap superuser has no rights there any more.
                assert "postgres" in {role.name for role in read(Database("one", postgres.url(name))).roles}
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
            admin.execute(f"DROP ROLE {owner}, {grantee}")


def test_a_cancelled_count_is_a_cancelled_operation(postgres: EmbeddedServer, database: str) -> None:
    with psycopg.connect(host="127.0.0.1", port=postgres.port, user="postgres", dbname=database) as inside:
        inside.execute("CREATE TABLE big AS SELECT generate_series(1, 3000000) i")
    operation = Operation()
    with hold_cut([Database("one", postgres.url(database))], Operation()) as cut:
        threading.Timer(0.1, lambda: operation.cancel("somebody cancelled it")).start()
        with pytest.raises(CancelledError, match="somebody"):
            while True:
                facts_of(cut.of("one"), operation)


def test_a_holder_lost_before_it_counts_fails_for_good(postgres: EmbeddedServer, database: str) -> None:
    with (
        psycopg.connect(host="127.0.0.1", port=postgres.port, user="postgres", autocommit=True) as admin,
        hold_cut([Database("one", postgres.url(database))], Operation()) as cut,
    ):
        held = cut.of("one")
        admin.execute("SELECT pg_terminate_backend(%s, 5000)", (held.reader_pid,))
        with pytest.raises(FinalError, match="held the snapshot was lost"):
            facts_of(held, Operation())
