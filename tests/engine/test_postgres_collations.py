"""What sorts otherwise at the destination is told by name: nothing else would say why an order, or a unique key, is another one.

The versions are made up in the manifest, as a restore onto another system would find them.
"""

from dataclasses import dataclass

import pytest
from round_trip import Make, dump, stage

from athena_backup.manifest import Collation, Component
from athena_backup.postgres.embedded import EmbeddedServer
from athena_backup.postgres.greeting import greeting
from athena_backup.postgres.sessions import Database, run_sql, session
from athena_backup.store.local import LocalStore

TABLES = """
CREATE TABLE public.t (own text, other text COLLATE pg_c_utf8, plain text COLLATE "C", i int);
CREATE INDEX by_own ON public.t (own); CREATE UNIQUE INDEX "by other" ON public.t (i, other); CREATE INDEX ON public.t (plain);
CREATE INDEX ON public.t (i)
"""


@dataclass(frozen=True)
class Versions:
    own: str
    other: str

    def of(self, component: Component) -> Component:
        facts = component.database
        assert facts is not None
        update = {
            "collation_version": self.own,
            "collations": (Collation(schema_name="pg_catalog", name="pg_c_utf8", version=self.other),),
        }
        return component.model_copy(update={"database": facts.model_copy(update=update)})


@pytest.fixture
def database(postgres: EmbeddedServer, make_database: Make) -> Database:
    make_database("sorted")
    with session(postgres.url()) as connection:
        run_sql(connection, "DROP DATABASE sorted")
        run_sql(
            connection, "CREATE DATABASE sorted TEMPLATE template0 LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"
        )
    found = Database("sorted", postgres.url("sorted"))
    with session(found.url) as connection:
        run_sql(connection, TABLES)
    return found


def test_those_of_the_same_version_are_not(database: Database, local_store: LocalStore) -> None:
    component = dump(database, local_store)
    assert component.database is not None
    assert component.database.collation_version == "1"
    assert [(one.name, one.version) for one in component.database.collations] == [("pg_c_utf8", "1")]
    assert stage(component, database, local_store).notes == ()


def test_a_database_whose_own_collation_has_another_version_by_now_is_backed_up(
    postgres: EmbeddedServer, database: Database, local_store: LocalStore
) -> None:
    """Its server warns whoever connects, in a language of its own: what it says is not known from a list."""
    with session(postgres.url()) as connection:
        run_sql(connection, "UPDATE pg_database SET datcollversion = '0' WHERE datname = 'sorted'")
    assert any("collation version mismatch" in line for line in greeting(database.url))
    component = dump(database, local_store)
    assert component.database is not None
    assert component.database.collation_version == "0"


def test_collations_of_another_version_are_told_with_their_indexes(database: Database, local_store: LocalStore) -> None:
    component = Versions(own="0.9", other="0.8").of(dump(database, local_store))
    assert stage(component, database, local_store).notes == (
        (
            'collation "pg_c_utf8" has version 1 here and had 0.8: text may be sorted otherwise; indexes by it, made anew:'
            ' "public"."by other"'
        ),
        (
            "the database's own collation has version 1 here and had 0.9: text may be sorted otherwise; indexes by it, made anew:"
            ' "public"."by_own"'
        ),
    )


def test_of_many_indexes_some_are_named(
    database: Database, local_store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("athena_backup.postgres.collations._NAMED_LIMIT", 1)
    with session(database.url) as connection:
        run_sql(connection, "CREATE INDEX a ON public.t (other); CREATE INDEX b ON public.t (other)")
    component = Versions(own="1", other="0.8").of(dump(database, local_store))
    (note,) = stage(component, database, local_store).notes
    assert note.endswith('indexes by it, made anew: "public"."a" and 2 more')
