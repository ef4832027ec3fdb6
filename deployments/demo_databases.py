"""The demo's databases: everything a PostgreSQL database can hold that a backup may get wrong, and how to compare it.

Five databases with the names of the platform's own, of some hundred MB in all. Rows are made by the server from seeds, so
two runs make the same data.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy
from sqlalchemy import URL, text

from athena_backup.errors import FinalError
from athena_backup.postgres.sessions import libpq_environment, quoted, run_sql, session

DATABASES = ("asp", "airflow", "gogs", "exec", "metadata")
OWNER = "prophecy"

_ROLES = (
    "CREATE ROLE prophecy LOGIN CREATEDB",
    "CREATE ROLE reporting NOLOGIN",
    "CREATE ROLE analyst NOLOGIN",
    "GRANT reporting TO analyst",
)
_PROPERTIES = (
    "COMMENT ON DATABASE asp IS 'the application''s own: 100% of it'",
    "GRANT CONNECT ON DATABASE asp TO reporting WITH GRANT OPTION",
    "REVOKE TEMPORARY ON DATABASE asp FROM PUBLIC",
    "ALTER DATABASE asp SET extra_float_digits = -5",
    'ALTER DATABASE asp SET search_path = "$user", public',
    "ALTER ROLE reporting IN DATABASE asp SET work_mem = '8MB'",
    "ALTER DATABASE gogs CONNECTION LIMIT 77",
)

# Wide and narrow tables, keys between them, every kind of object.
_ASP = """
CREATE FUNCTION longer(text, text) RETURNS text LANGUAGE sql IMMUTABLE AS
 'SELECT CASE WHEN length($1) >= length($2) THEN $1 ELSE coalesce($2, $1) END';
CREATE EXTENSION pg_trgm;
CREATE TYPE state AS ENUM ('draft', 'active', 'Größe', '保管');
CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
CREATE TABLE teams (id serial PRIMARY KEY, name text NOT NULL UNIQUE, tags text[] DEFAULT '{{}}');
CREATE TABLE users (
  id bigint GENERATED ALWAYS AS IDENTITY (START 1000) PRIMARY KEY,
  team integer NOT NULL REFERENCES teams DEFERRABLE INITIALLY DEFERRED,
  email text NOT NULL, born date, score positive, gone text,
  lower_email text GENERATED ALWAYS AS (lower(email)) STORED, picture bytea);
ALTER TABLE users DROP COLUMN gone;
CREATE TABLE events (at timestamptz NOT NULL, kind state NOT NULL, body jsonb, amount numeric(20, 6)) PARTITION BY RANGE (at);
CREATE TABLE events_2025 PARTITION OF events FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE TABLE events_2026 PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
CREATE TABLE events_rest PARTITION OF events DEFAULT;
CREATE TABLE wide (id integer PRIMARY KEY, {columns});
CREATE TABLE parent (id integer PRIMARY KEY, note text);
CREATE TABLE child (extra double precision) INHERITS (parent);
CREATE TABLE nothing (id integer);
CREATE UNLOGGED TABLE scratch (id integer);
CREATE TABLE scripts (language text PRIMARY KEY, sample text);
CREATE TABLE "Odd ""name"": 100%" ("a b" integer, "ü:x" text);
CREATE TABLE secrets (owner_name text, content text);
ALTER TABLE secrets ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON secrets USING (owner_name = current_user);
CREATE SEQUENCE tickets INCREMENT 5 START 17 CYCLE MAXVALUE 1000000;
CREATE VIEW active AS SELECT u.id, u.email, t.name AS team FROM users u JOIN teams t ON t.id = u.team;
CREATE MATERIALIZED VIEW per_team AS SELECT team, count(*) AS members FROM users GROUP BY team;
CREATE MATERIALIZED VIEW never_filled AS SELECT * FROM users WITH NO DATA;
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.note := coalesce(NEW.note, '') || ' ✓'; RETURN NEW; END $$;
CREATE TRIGGER touch BEFORE INSERT ON parent FOR EACH ROW EXECUTE FUNCTION touch();
CREATE PROCEDURE nap() LANGUAGE sql AS 'SELECT 1';
CREATE AGGREGATE longest(text) (SFUNC = longer, STYPE = text);
CREATE INDEX users_by_email ON users USING gin (email gin_trgm_ops);
CREATE INDEX events_by_body ON events USING gin (body);
CREATE INDEX some_scores ON users (score) WHERE score > 50;
CREATE STATISTICS users_stats ON team, score FROM users;
CREATE RULE quiet AS ON DELETE TO nothing DO INSTEAD NOTHING;
GRANT SELECT ON users TO reporting;
GRANT SELECT (id, name) ON teams TO analyst WITH GRANT OPTION;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO reporting;
COMMENT ON TABLE users IS 'It''s who we serve: 100% of them';
COMMENT ON COLUMN users.email IS E'two\\nlines';
INSERT INTO teams (name, tags) SELECT 'team ' || i, ARRAY['a' || i, NULL, 'quote"d, {{x}}'] FROM generate_series(1, 50) i;
INSERT INTO users (team, email, born, score, picture)
 SELECT 1 + i % 50, 'User' || i || '@Example.org', date '1960-01-01' + i % 20000, 1 + i % 100,
  CASE WHEN i % 10 = 0 THEN decode(repeat(md5(i::text), 40), 'hex') END FROM generate_series(1, {rows}) i;
INSERT INTO events SELECT timestamptz '2024-06-01 00:00:00.123456+00' + i * interval '37 minutes',
  (ARRAY['draft', 'active', 'Größe', '保管'])[1 + i % 4]::state,
  jsonb_build_object('n', i, 'hash', md5(i::text), 'list', jsonb_build_array(i, NULL, 'x"y')), i / 7.0
 FROM generate_series(1, {rows} * 2) i;
INSERT INTO wide SELECT i, {values} FROM generate_series(1, {rows} / 20) i;
INSERT INTO parent (id) SELECT generate_series(1, 100);
INSERT INTO child VALUES (1, 'one', 'NaN'), (2, 'two', '-Infinity'), (3, NULL, 0.1::float8 + 0.2::float8);
INSERT INTO scripts VALUES ('ελληνικά', 'Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία'), ('עברית', 'דג סקרן שט בים'),
 ('日本語', 'いろはにほへと'), ('العربية', 'نص حكيم له سر قاطع'), ('emoji', '🗄️ → 💾'), ('control', E'\\t\\r\\n\\\\ \\x01'), ('empty', '');
INSERT INTO "Odd ""name"": 100%" VALUES (1, 'x'), (NULL, NULL);
INSERT INTO secrets SELECT CASE i % 2 WHEN 0 THEN 'prophecy' ELSE 'reporting' END, md5(i::text) FROM generate_series(1, 10) i;
INSERT INTO scratch SELECT generate_series(1, 10);
SELECT setval('tickets', 4242, false);
SELECT lo_from_bytea(0, decode(repeat(md5(i::text), 2000), 'hex')) FROM generate_series(1, 20) i;
REFRESH MATERIALIZED VIEW per_team;
"""
_AIRFLOW = """
CREATE SCHEMA dags;
CREATE TABLE dags.run (id bigserial PRIMARY KEY, dag text, conf json, log text, times tstzrange, peer inet, mask bit(8));
INSERT INTO dags.run (dag, conf, log, times, peer, mask)
 SELECT 'dag_' || i % 100, json_build_object('i', i), repeat(md5(i::text), 8), tstzrange(to_timestamp(i), to_timestamp(i + 60)),
  ('10.0.0.' || i % 255)::inet, (i % 256)::bit(8) FROM generate_series(1, {rows} * 2) i;
CREATE INDEX ON dags.run (dag, id);
CREATE TABLE dags.log_blob (id integer PRIMARY KEY, content text);
ALTER TABLE dags.log_blob ALTER content SET STORAGE EXTERNAL;
INSERT INTO dags.log_blob SELECT i, repeat(md5(i::text), 10000) FROM generate_series(1, 100) i;
"""
_GOGS = """
CREATE EXTENSION hstore;
CREATE TABLE repository (id integer PRIMARY KEY, owner text, name text, settings hstore, UNIQUE (owner, name));
CREATE TABLE issue (id bigint PRIMARY KEY, repository integer REFERENCES repository ON DELETE CASCADE, title text, body text);
INSERT INTO repository SELECT i, 'user' || i % 100, 'repo' || i, hstore('private', (i % 2)::text) FROM generate_series(1, 5000) i;
INSERT INTO issue SELECT i, 1 + i % 5000, 'title ' || i, repeat(md5(i::text) || ' ', 6) FROM generate_series(1, {rows} * 2) i;
CREATE INDEX ON issue (repository);
"""
_EXEC = """
CREATE TABLE job (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), spec jsonb, took interval, output bytea);
INSERT INTO job SELECT md5(i::text)::uuid, jsonb_build_object('step', i), make_interval(secs => i),
 decode(repeat(md5(i::text), 16), 'hex') FROM generate_series(1, {rows}) i;
CREATE PUBLICATION jobs FOR TABLE job;
"""

_DESTRUCTION = {
    "asp": """
DROP TABLE users, teams CASCADE; TRUNCATE events; SELECT setval('tickets', 1); DROP FUNCTION touch CASCADE;
SELECT lo_unlink(oid) FROM pg_largeobject_metadata; UPDATE scripts SET sample = 'gone';
COMMENT ON DATABASE asp IS NULL; ALTER DATABASE asp RESET ALL; ALTER DATABASE asp CONNECTION LIMIT 3;
""",
    "airflow": "DELETE FROM dags.run WHERE id % 3 = 0; ALTER TABLE dags.log_blob DROP COLUMN content",
}


def build_databases(server: URL, size: float) -> None:
    """Make the five databases on ``server`` (a superuser's URL); ``size`` 1 is some hundred MB."""
    rows = max(100, int(100_000 * size))
    with session(server) as connection:
        for statement in _ROLES:
            run_sql(connection, statement)
        for name in DATABASES:
            run_sql(connection, f"CREATE DATABASE {quoted(name)} OWNER {OWNER}")
        for statement in _PROPERTIES:
            run_sql(connection, statement)
    columns = ", ".join(f"c{number} text" for number in range(60))
    values = ", ".join(f"md5((i + {number})::text)" for number in range(60))
    scripts = {"asp": _ASP, "airflow": _AIRFLOW, "gogs": _GOGS, "exec": _EXEC}
    for name, script in scripts.items():
        with session(server.set(database=name), {"search_path": "public"}) as connection:
            run_sql(connection, script.format(rows=rows, columns=columns, values=values))


def destroy_databases(server: URL) -> list[str]:
    """Do to three databases what people do on their worst day; returns what was done."""
    for name, script in _DESTRUCTION.items():
        with session(server.set(database=name), {"search_path": "public"}) as connection:
            run_sql(connection, script)
    with session(server) as connection:
        run_sql(connection, "DROP DATABASE gogs WITH (FORCE)")
    return [
        "asp: tables dropped and truncated, large objects unlinked, settings reset",
        "airflow: a third of the rows deleted, a column dropped",
        "gogs: the whole database dropped",
    ]


def fingerprint_databases(server: URL, binaries: Path, *, missing_ok: bool = False) -> dict[str, str]:
    """What has to be equal before and after: schema, every row of every table, sequences, large objects, properties.

    A database that is not there raises `FinalError`, or has no facts with ``missing_ok``.
    """
    facts: dict[str, str] = {}
    with session(server) as connection:
        there = set(connection.execute(text("SELECT datname FROM pg_database")).scalars())
    for name in DATABASES if not missing_ok else [name for name in DATABASES if name in there]:
        url = server.set(database=name)
        facts[f"{name}: schema"] = _schema(url, binaries)
        facts[f"{name}: properties"] = _properties(server, name)
        with session(url) as connection:
            tables = connection.execute(
                text(
                    "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
                    " WHERE c.relkind IN ('r', 'm') AND n.nspname !~ '^pg_|^information_schema' AND c.relispopulated ORDER BY 1"
                )
            ).scalars()
            for table in tables:
                counted = f"SELECT count(*), sum(hashtextextended(t::text, 0)::numeric) FROM ONLY {table} t"  # noqa: S608
                facts[f"{name}: {table}"] = _joined(run_sql(connection, counted).one())
            sequences = text(
                "SELECT format('%I.%I', schemaname, sequencename), last_value FROM pg_sequences ORDER BY 1"
            )
            for sequence, value in connection.execute(sequences):
                facts[f"{name}: sequence {sequence}"] = str(value)
            large = "SELECT count(*), sum(hashtextextended(encode(lo_get(oid), 'hex'), 0)::numeric) FROM pg_largeobject_metadata"
            facts[f"{name}: large objects"] = _joined(connection.execute(text(large)).one())
    return facts


def _properties(server: URL, name: str) -> str:
    with session(server) as connection:
        row = connection.execute(
            text(
                "SELECT pg_get_userbyid(datdba), ARRAY(SELECT unnest(datacl)::text ORDER BY 1), datconnlimit, datcollate, datctype,"
                " pg_encoding_to_char(encoding), shobj_description(d.oid, 'pg_database'),"
                " (SELECT string_agg(coalesce(r.rolname, '-') || ' ' || array_to_string(ARRAY(SELECT unnest(setconfig) ORDER BY 1),"
                " ','), ';' ORDER BY r.rolname)"
                " FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = d.oid)"
                " FROM pg_database d WHERE datname = :name"
            ),
            {"name": name},
        ).one()
    return _joined(row)


def _joined(row: "sqlalchemy.Row[tuple[object, ...]]") -> str:
    return " | ".join(str(value) for value in row)


def _schema(url: URL, binaries: Path) -> str:
    environment: Mapping[str, str] = {"PATH": os.environ.get("PATH", ""), **libpq_environment(url)}
    command = [str(binaries / "pg_dump"), "--schema-only", "--restrict-key=demo", "--no-password"]
    dumped = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if dumped.returncode != 0:
        raise FinalError(f"the comparison could not read the schema of {url.database}: {dumped.stderr.strip()}")
    statements = re.sub(r"^--.*\n", "", dumped.stdout, flags=re.MULTILINE)
    return hashlib.sha256(statements.encode()).hexdigest()
