"""Where the order of a load, or the OIDs of the destination, decide what the rows become.

`pg_dump` and `pg_restore` care for the first of these; what is loaded by COPY beside them has to as well.
"""

from sqlalchemy import Connection, text

# Of parts(oid, part): what the value of a type is made of, which are base types, elements, attributes and bounds.
_AND_THEIR_PARTS = (
    " UNION SELECT p.oid, x.part FROM parts p JOIN (SELECT t.oid, t.typbasetype AS part FROM pg_catalog.pg_type t"
    " WHERE t.typbasetype OPERATOR(pg_catalog.<>) CAST(0 AS oid)"
    " UNION ALL SELECT t.oid, t.typelem FROM pg_catalog.pg_type t WHERE t.typelem OPERATOR(pg_catalog.<>) CAST(0 AS oid)"
    " UNION ALL SELECT t.oid, a.atttypid FROM pg_catalog.pg_type t JOIN pg_catalog.pg_attribute a"
    " ON a.attrelid OPERATOR(pg_catalog.=) t.typrelid AND a.attnum OPERATOR(pg_catalog.>) 0"
    " WHERE t.typrelid OPERATOR(pg_catalog.<>) CAST(0 AS oid)"
    " UNION ALL SELECT r.rngtypid, r.rngsubtype FROM pg_catalog.pg_range r) x ON x.oid OPERATOR(pg_catalog.=) p.part"
)
# A hash of an enum's value is one of its label's OID, which is another one after a restore, and so is one of an array or row
# that holds some. Such partitions are filled anew from the root ("pg_dump", --load-via-partition-root). Of an expression no
# catalog tells the type: one that may hold enums is believed to.
_REROUTED = text(
    "WITH RECURSIVE parts(oid, part) AS (SELECT DISTINCT a.atttypid, a.atttypid FROM pg_catalog.pg_partitioned_table p"  # noqa: S608 - constants
    " JOIN pg_catalog.pg_attribute a ON a.attrelid OPERATOR(pg_catalog.=) p.partrelid"
    " AND a.attnum OPERATOR(pg_catalog.=) ANY (p.partattrs) WHERE p.partstrat OPERATOR(pg_catalog.=) 'h'"
    f"{_AND_THEIR_PARTS}),"
    " below(root, oid) AS (SELECT p.partrelid, p.partrelid FROM pg_catalog.pg_partitioned_table p"
    " WHERE p.partstrat OPERATOR(pg_catalog.=) 'h' AND (EXISTS (SELECT FROM pg_catalog.pg_attribute a"
    " JOIN parts o ON o.oid OPERATOR(pg_catalog.=) a.atttypid JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) o.part"
    " WHERE a.attrelid OPERATOR(pg_catalog.=) p.partrelid AND a.attnum OPERATOR(pg_catalog.=) ANY (p.partattrs)"
    " AND t.typtype OPERATOR(pg_catalog.=) 'e') OR p.partexprs IS NOT NULL AND EXISTS (SELECT FROM pg_catalog.pg_opclass o"
    " WHERE o.oid OPERATOR(pg_catalog.=) ANY (p.partclass)"
    " AND o.opcname OPERATOR(pg_catalog.=) ANY (ARRAY['enum_ops', 'array_ops', 'record_ops', 'range_ops'])"
    " AND o.opcnamespace OPERATOR(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace))"
    " UNION ALL SELECT b.root, i.inhrelid FROM below b JOIN pg_catalog.pg_inherits i"
    " ON i.inhparent OPERATOR(pg_catalog.=) b.oid)"
    " SELECT DISTINCT ON (c.oid) c.oid::bigint AS oid, n.nspname AS schema_name, c.relname AS name, b.root::bigint AS root"
    " FROM below b JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) b.oid"
    " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " WHERE c.relkind OPERATOR(pg_catalog.=) 'r' ORDER BY c.oid,"
    # Of nested ones the outermost, which has the most below it.
    " (SELECT count(*) FROM below o WHERE o.root OPERATOR(pg_catalog.=) b.root) DESC"
)
# Checks and stored values by a function that somebody wrote in SQL or a procedural language: it may look into other tables,
# though the manual forbids it (5.4.1 and 5.3).
_DEPENDENT = text(
    "WITH RECURSIVE parts(oid, part) AS (SELECT DISTINCT a.atttypid, a.atttypid FROM pg_catalog.pg_attribute a"  # noqa: S608 - constants
    " JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) a.attrelid AND c.relkind OPERATOR(pg_catalog.=) 'r'"
    " WHERE a.atttypid OPERATOR(pg_catalog.>=) CAST(16384 AS oid)"
    f"{_AND_THEIR_PARTS})"
    " SELECT DISTINCT c.oid::bigint AS oid, n.nspname AS schema_name, c.relname AS name FROM pg_catalog.pg_class c"
    " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " JOIN (SELECT d.adrelid AS relid, d.oid AS oid, 'pg_catalog.pg_attrdef'::pg_catalog.regclass AS catalog"
    " FROM pg_catalog.pg_attrdef d JOIN pg_catalog.pg_attribute a ON a.attrelid OPERATOR(pg_catalog.=) d.adrelid"
    " AND a.attnum OPERATOR(pg_catalog.=) d.adnum WHERE a.attgenerated OPERATOR(pg_catalog.=) 's'"
    " UNION ALL SELECT k.conrelid, k.oid, 'pg_catalog.pg_constraint'::pg_catalog.regclass"
    " FROM pg_catalog.pg_constraint k WHERE k.contype OPERATOR(pg_catalog.=) 'c'"
    " AND k.conrelid OPERATOR(pg_catalog.<>) CAST(0 AS oid)"
    " UNION ALL SELECT a.attrelid, k.oid, 'pg_catalog.pg_constraint'::pg_catalog.regclass"
    " FROM pg_catalog.pg_constraint k JOIN parts p ON p.part OPERATOR(pg_catalog.=) k.contypid"
    " JOIN pg_catalog.pg_attribute a ON a.atttypid OPERATOR(pg_catalog.=) p.oid AND a.attnum OPERATOR(pg_catalog.>) 0"
    " WHERE k.contype OPERATOR(pg_catalog.=) 'c' AND k.contypid OPERATOR(pg_catalog.<>) CAST(0 AS oid)) x"
    " ON x.relid OPERATOR(pg_catalog.=) c.oid"
    " JOIN pg_catalog.pg_depend d ON d.classid OPERATOR(pg_catalog.=) x.catalog AND d.objid OPERATOR(pg_catalog.=) x.oid"
    " LEFT JOIN pg_catalog.pg_operator o ON o.oid OPERATOR(pg_catalog.=) d.refobjid"
    " AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_operator'::pg_catalog.regclass"
    " JOIN pg_catalog.pg_proc f ON f.oid OPERATOR(pg_catalog.=) coalesce(o.oprcode::oid, CASE WHEN d.refclassid"
    " OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass THEN d.refobjid END)"
    " JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) f.prolang"
    " WHERE c.relkind OPERATOR(pg_catalog.=) 'r' AND l.lanname NOT IN ('internal', 'c')"
    " ORDER BY n.nspname, c.relname"
)


def rerouted_partitions(connection: Connection) -> dict[int, int]:
    """The partitions whose rows may stand in another one after a restore, with the table that they are loaded through (OIDs)."""
    return {row.oid: row.root for row in connection.execute(_REROUTED)}


def rerouted_partition_names(connection: Connection) -> dict[tuple[str, str], int]:
    """The same by schema and name."""
    return {(row.schema_name, row.name): row.root for row in connection.execute(_REROUTED)}


def order_dependent_tables(connection: Connection) -> dict[int, tuple[str, str]]:
    """The tables whose rows may be refused, or be given other values, unless all other rows are there: OIDs, schemas and
    names, in the order of their names, in which `pg_dump` would have them loaded."""
    return {row.oid: (row.schema_name, row.name) for row in connection.execute(_DEPENDENT)}
