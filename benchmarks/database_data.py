"""The databases that are measured: made on the server by generate_series and hashes, the same at every build.

One table holds most of a `Bulk` database; several are middle-sized, one has long values out of line, many are small. What
hashes give compresses about as real text and numbers do, never better than 4 to 1, which `compression` proves.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard
from psycopg import sql

from benchmarks.servers import Cluster

DATABASE = "bench"
BIG = "events"
RATIO_LIMIT = 4.0
CHUNK_BYTES = 256 << 10
_SAMPLE_BYTES = 32 << 20
_TABLES_A_TURN = 500

_WORDS = "(ARRAY['created','updated','signed in','paid','shipped','returned','failed','refunded'])"
_DEFINITIONS = (
    "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
    "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid <> 0 ORDER BY 1, 2",
)


@dataclass(frozen=True)
class Bulk:
    """A database of about ``units`` times ``rows`` events and what belongs to them; 1,000,000 events are some 340 MB of COPY data."""

    units: int
    rows: int
    small_tables: int = 100


@dataclass(frozen=True)
class Many:
    """A database of that many tables of twenty rows each."""

    tables: int


Database = Bulk | Many
Fingerprint = dict[str, str]


def build(cluster: Cluster, asked: Database) -> None:
    """Make the database, vacuumed and analyzed, if the cluster hasn't got it; one half made is made anew."""
    with cluster.connect() as session:
        if session.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone():
            return
    making = f"{DATABASE}_in_the_making"
    cluster.drop(making)
    cluster.create(making)
    began = time.perf_counter()
    with cluster.connect(making) as session:
        for statement in _bulk(asked) if isinstance(asked, Bulk) else _many(asked.tables):
            session.execute(statement.encode())
        session.execute("VACUUM (FREEZE, ANALYZE)")
    cluster.execute(sql.SQL("ALTER DATABASE {} RENAME TO {}").format(sql.Identifier(making), sql.Identifier(DATABASE)))
    cluster.settle()
    print(f"  {asked} made in {time.perf_counter() - began:.0f} s", flush=True)


def _bulk(asked: Bulk) -> Iterator[str]:
    """Its statements: data first, then keys and indexes, as nobody measures how it is made."""
    events = asked.units * asked.rows
    accounts, orders, measures, documents = events // 80, events // 6, events // 3, events // 420
    yield f"""
        CREATE TABLE accounts AS SELECT i AS id, md5(i::text || 'a') || '@example.org' AS email,
        (hashint8extended(i, 1) & 1048575)::int AS score, '2020-01-01'::timestamptz + (hashint8extended(i, 2) & 134217727)
        * interval '1 s' AS joined, {_WORDS}[1 + (i & 7)] AS state, gen.i % 3 = 0 AS active
        FROM generate_series(1, {accounts}::bigint) AS gen(i)"""
    yield f"""
        CREATE TABLE {BIG} AS SELECT i AS id, (hashint8extended(i, 3) & 2147483647) % {accounts} + 1 AS account,
        '2024-01-01'::timestamptz + (hashint8extended(i, 4) & 1099511627775) * interval '1 microsecond' * 60 AS at,
        {_WORDS}[1 + (hashint8extended(i, 5) & 7)] AS kind, (hashint8extended(i, 6) & 16777215)::numeric / 100 AS amount,
        md5(i::text || 'e')::uuid AS token, md5(i::text || 'p') || ' ' || {_WORDS}[1 + (hashint8extended(i, 7) & 7)]
        || ' by ' || encode(sha256(int8send(i)), 'base64') || ' from 10.' || (hashint8extended(i, 8) & 255) || '.'
        || (hashint8extended(i, 9) & 255) || '.' || (hashint8extended(i, 10) & 255) || ' with ' || md5(i::text || 'q')
        AS detail FROM generate_series(1, {events}::bigint) AS gen(i)"""
    yield f"""
        CREATE TABLE orders AS SELECT i AS id, (hashint8extended(i, 11) & 2147483647) % {accounts} + 1 AS account,
        md5(i::text || 'o')::uuid AS number, (hashint8extended(i, 12) & 1048575)::numeric / 100 AS total,
        '2024-01-01'::timestamptz + i * interval '1 s' AS placed, jsonb_build_object('sku', md5(i::text || 's'),
        'count', hashint8extended(i, 13) & 15, 'gift', i % 7 = 0) AS lines
        FROM generate_series(1, {orders}::bigint) AS gen(i)"""
    yield f"""
        CREATE TABLE measures AS SELECT i AS id, (hashint8extended(i, 14) & 1023)::int AS sensor,
        '2024-01-01'::timestamptz + i * interval '1 s' AS at, hashint8extended(i, 15) / 1e15::float8 AS value,
        (hashint8extended(i, 16) & 7)::smallint AS quality FROM generate_series(1, {measures}::bigint) AS gen(i)"""
    yield f"""
        CREATE TABLE documents AS SELECT i AS id, md5(i::text || 'd') AS title, (SELECT string_agg(encode(sha256(
        int8send(i * 1000 + j)), 'base64'), ' ') FROM generate_series(1, 150 + (i & 255)) AS line(j)) AS body
        FROM generate_series(1, {documents}::bigint) AS gen(i)"""
    for number in range(asked.small_tables):
        yield f"""
            CREATE TABLE small_{number:03} AS SELECT i::int AS id, md5(i::text || '{number}') AS name,
            (hashint8extended(i, {number}) & 65535)::int AS value FROM generate_series(1, 200::bigint) AS gen(i)"""
        yield f"ALTER TABLE small_{number:03} ADD PRIMARY KEY (id)"
    for table in ("accounts", BIG, "orders", "measures", "documents"):
        yield f"ALTER TABLE {table} ADD PRIMARY KEY (id)"
    yield f"CREATE INDEX ON {BIG} (account)"
    yield f"CREATE INDEX ON {BIG} (at)"
    yield "CREATE UNIQUE INDEX ON accounts (email)"
    yield "CREATE INDEX ON measures (sensor, at)"
    yield "ALTER TABLE orders ADD FOREIGN KEY (account) REFERENCES accounts"


def _many(tables: int) -> Iterator[str]:
    for first in range(0, tables, _TABLES_A_TURN):
        yield f"""
            DO $$ BEGIN FOR number IN {first}..{min(first + _TABLES_A_TURN, tables) - 1} LOOP
            EXECUTE format('CREATE TABLE t_%1$s AS SELECT i::int AS id, md5(i::text || ''%1$s'') AS name,'
            ' (hashint8extended(i, %1$s) & 65535)::int AS value FROM generate_series(1, 20::bigint) AS gen(i)', number);
            EXECUTE format('ALTER TABLE t_%s ADD PRIMARY KEY (id)', number); END LOOP; END $$"""


def leftovers(cluster: Cluster) -> list[str]:
    """Databases that an unfinished build, or a restore of ours that was killed, has left."""
    with cluster.connect() as session:
        found = session.execute(
            "SELECT datname FROM pg_database WHERE datname LIKE '%\\_\\_athena\\_%' OR datname LIKE '%\\_making'"
        )
        return [str(name) for (name,) in found]


def tables_of(cluster: Cluster, database: str = DATABASE) -> list[str]:
    """The names of its tables."""
    with cluster.connect(database) as session:
        found = session.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY relname"
        )
        return [str(name) for (name,) in found]


def fingerprint(cluster: Cluster, database: str = DATABASE) -> Fingerprint:
    """Each table's rows and their hash, and the definitions of indexes and constraints."""
    found: Fingerprint = {}
    with cluster.connect(database) as session:
        session.execute("SET max_parallel_workers_per_gather = 2")
        for name in tables_of(cluster, database):
            count = sql.SQL("SELECT count(*), bit_xor(hash_record_extended(t, 0)) FROM {} AS t")
            found[name] = str(session.execute(count.format(sql.Identifier("public", name))).fetchone())
        for query in _DEFINITIONS:
            found[query] = str(session.execute(query).fetchall())
    return found


def table_bytes(cluster: Cluster) -> dict[str, int]:
    """Size of each table, TOAST included, indexes not."""
    with cluster.connect(DATABASE) as session:
        found = session.execute(
            "SELECT relname, pg_table_size(oid) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
        return {str(name): int(size) for name, size in found}


def copied(
    cluster: Cluster, psql: Path, query: str, take: Callable[[bytes], object], limit_bytes: int | None = None
) -> int:
    """Hand out what COPY of a query gives, by psql and a pipe; the bytes handed out. Raises `RuntimeError` if it broke off."""
    process = subprocess.Popen(
        [str(psql), "--no-psqlrc", "--quiet", "-d", cluster.url(DATABASE), "-c", query], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    total = 0
    with process.stdout:
        while chunk := process.stdout.read(CHUNK_BYTES):
            take(chunk)
            total += len(chunk)
            if limit_bytes is not None and total >= limit_bytes:
                process.terminate()
                break
    if process.wait() != 0 and (limit_bytes is None or total < limit_bytes):
        raise RuntimeError(f"{query} broke off after {total} bytes")
    return total


def compression(cluster: Cluster, psql: Path) -> dict[str, float]:
    """How well zstd 1 compresses the (beginning of the) COPY text of each table; raises if one compresses too well."""
    ratios: dict[str, float] = {}
    for name in tables_of(cluster):
        compressor = zstandard.ZstdCompressor(level=1).compressobj()
        sizes: list[int] = []

        def take(chunk: bytes, to: "zstandard.ZstdCompressionObj" = compressor, sizes: list[int] = sizes) -> None:
            sizes.append(len(to.compress(chunk)))

        raw = copied(cluster, psql, f'COPY public."{name}" TO STDOUT', take, _SAMPLE_BYTES)
        sizes.append(len(compressor.flush()))
        ratios[name] = raw / sum(sizes)
    worst = max(ratios, key=lambda name: ratios[name])
    if ratios[worst] > RATIO_LIMIT:
        raise RuntimeError(f"table {worst} compresses {ratios[worst]:.1f} to 1")
    return ratios
