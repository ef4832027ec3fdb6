"""What our sessions are set to, without which a read may silently be incomplete or different ("PostgreSQL", section 2)."""

from collections.abc import Mapping

from sqlalchemy import Connection, text

# How values are written and read, `pg_dump`'s and `pg_restore`'s sessions included, which don't set these: money is read in no
# other locale than that in which it was written, and with array_nulls off NULL comes back as a text of four letters (tried).
FORMAT_SETTINGS = {"lc_monetary": "C", "array_nulls": "on"}
# So that the server notices when our machine is gone: until then the locks of a backup stand, and whoever waits for one of them
# keeps all others from the table. As the system comes it would take two hours (manual, 20.3.2; the client's are `sessions`').
# No tcp_user_timeout: it also ends a connection whose reader lives and waits for its store (tcp(7), tried).
KEEPALIVE_SETTINGS = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
# Of a child of ours, whose standard error is read for what went wrong: a login's event trigger may have something to tell.
CHILD_SETTINGS = {**FORMAT_SETTINGS, **KEEPALIVE_SETTINGS, "client_min_messages": "warning"}
# Without each of these a read can be incomplete, differ by the database's own settings, or be cut off ("PostgreSQL", 2).
READING_SETTINGS = {
    **FORMAT_SETTINGS,
    **KEEPALIVE_SETTINGS,
    "row_security": "off",
    "search_path": "",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "synchronize_seqscans": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "xmloption": "content",
    "default_transaction_read_only": "off",
    "default_transaction_isolation": "read committed",
}

COUNTING_SETTINGS = {"enable_indexonlyscan": "off", "enable_indexscan": "off", "enable_bitmapscan": "off"}
"""What is counted is what is copied, the table: a defective index may hold another number of rows (tried)."""

# The driver has no codec for these. The bytes of SQL_ASCII mean nothing: as LATIN1 each comes and goes as it is.
_CLIENT_ENCODINGS = {"SQL_ASCII": "LATIN1", "EUC_TW": "UTF8"}
# In one statement: each look into pg_settings takes the server some milliseconds. In Turkish the small letter of I is another one.
# `unnest` of several arrays is the server's own only without its schema's name (manual, 7.2.1.4).
SET_THOSE_KNOWN = (
    "SELECT pg_catalog.set_config(s.name, known.value, false) FROM pg_catalog.pg_settings s"
    ' JOIN {} ON pg_catalog.lower(s.name COLLATE pg_catalog."C") OPERATOR(pg_catalog.=) known.name'
)


def client_encoding(server_encoding: str) -> str:
    """The client_encoding in which a database of that encoding is read and loaded."""
    return _CLIENT_ENCODINGS.get(server_encoding, server_encoding)


def apply_settings(connection: Connection, settings: Mapping[str, str]) -> None:
    """Set what of ``settings`` this server knows, for the session: transaction_timeout came with 17, for example."""
    connection.execute(
        text(
            SET_THOSE_KNOWN.format(
                "unnest(CAST(:names AS pg_catalog.text[]), CAST(:texts AS pg_catalog.text[])) AS known (name, value)"
            )
        ),
        {"names": list(settings), "texts": list(settings.values())},
    )
