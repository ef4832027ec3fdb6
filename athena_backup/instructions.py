"""RESTORE.md: how to get the data out of a set with stock tools, for someone who has lost this program."""

import shlex
from collections.abc import Sequence

from athena_backup.manifest import INSTRUCTIONS, Component, DatabaseFacts, Manifest, Server, Stream, component_folder
from athena_backup.postgres.copy_in import copy_statement
from athena_backup.postgres.session_settings import FORMAT_SETTINGS, client_encoding
from athena_backup.postgres.sessions import ascii_quoted, connection_string, quoted

_TIMEOUT_MAJOR = 17
"""The version of PostgreSQL that brought transaction_timeout, which every dump written by it sets."""

_PROVIDER_SINCE = 150_000
"""The server, and createdb, that know more locale providers than libc."""

_HEAD = """# Restoring backup set {set_id} by hand

Written by {software}. Everything below needs only stock tools: `zstd`, `tar`, `python3`, and PostgreSQL's client programs
of major version {major} or newer. `athena-backup` does all of this by itself, checks every byte on the way, and switches only
whole components; use this page when it can't be had.

Copy the whole folder `{prefix}` out of the store, go into it, and run all commands in one `bash` of their own (start it by
`bash`): `-e` ends it at the first error, as it would end the shell that you work in.

```bash
set -eo pipefail
{server}```

`manifest.json` holds the SHA-256 of every part (`sha256sum` gives the same), the row count of every table, and each
database's owner, rights and settings, which no dump of a single database holds.
"""

_SERVER = """\
export PGHOST=the-new-server PGPORT=5432 PGUSER=postgres PGPASSWORD=its-password   # change these, to a superuser's
"""

_DATABASES = """
## Databases

Create the roles that the database refers to first. If the set has those of the servers, this prints them, for reading: take
from it what you need.

```bash
for roles in globals/*.sql.zst; do if [ -e "$roles" ]; then zstd -dc < "$roles"; fi; done
```

Then create each database from `template0`, and load it:
"""

_SETTINGS = """
### Settings and rights of the databases

This prints what belongs to each database and is in no dump: its rights (`acl`; `null`: those of every new database), comment,
security labels, settings, limit of connections, and whether it is a template.

```bash
python3 -c '{script}'
```

Give it to them by `GRANT` and `REVOKE … ON DATABASE`, `COMMENT ON DATABASE`, `SECURITY LABEL ON DATABASE`, `ALTER DATABASE …
CONNECTION LIMIT`, `… IS_TEMPLATE` and `… SET name TO 'value'`; a setting with a role by `ALTER ROLE … IN DATABASE … SET`. The
values of `search_path`, `temp_tablespaces` and the two `…_preload_libraries` are lists of names: no quotes around the whole,
and `''` for an empty one, which is `""` here.
"""

# One line for a shell, so without a single quote.
_SCRIPT = (
    "import json; [print(json.dumps({name: one[name] for name in ("
    + ", ".join(
        f'"{name}"'
        for name in ("database", "owner", "acl", "comment", "labels", "settings", "connection_limit", "is_template")
    )
    + ')}, indent=1, ensure_ascii=False)) for component in json.load(open("manifest.json", "rb"))["components"]'
    ' if (one := component["database"])]'
)

_VOLUMES = """
## Volumes

Stop whatever uses the volume, empty its directory, and extract as root, every archive of a volume on its own, in order:
"""


def instructions(manifest: Manifest) -> str:
    """The text of RESTORE.md for a set that is about to be closed."""
    databases = [component for component in manifest.components if component.kind == "database"]
    volumes = [component for component in manifest.components if component.kind == "volume"]
    major = max((_dump_major(one.database) for one in databases if one.database is not None), default=13)
    text = _HEAD.format(
        set_id=manifest.set_id,
        software=manifest.software,
        prefix=manifest.set_id.prefix,
        major=major,
        name=INSTRUCTIONS,
        server=_SERVER if databases else "",
    )
    if databases:
        text += _DATABASES
        text += "".join(_database(manifest, component) for component in databases)
        text += _SETTINGS.format(script=_SCRIPT)
    if volumes:
        text += _VOLUMES
        text += "".join(_volume(manifest, component) for component in volumes)
    return text


def _database(manifest: Manifest, component: Component) -> str:
    facts = component.database
    if facts is None:
        return ""
    folder = _relative_folder(manifest, component)
    dump, *tables = component.streams
    target = shlex.quote(connection_string(facts.database))
    psql = f"psql --no-psqlrc --quiet --output=/dev/null --set=ON_ERROR_STOP=1 --dbname={target}"

    def load(sections: str = "") -> str:
        pg_restore = f"pg_restore --exit-on-error{sections} --dbname={target}"
        if (
            _dump_major(facts) >= _TIMEOUT_MAJOR
            and component.server
            and component.server.version < _TIMEOUT_MAJOR * 10_000
        ):
            # Such a dump sets a parameter that the server lacks, in its first lines.
            pg_restore = f"pg_restore --file=-{sections} | sed '1,50{{/^SET transaction_timeout = 0;$/d;}}' | {psql}"
        return f"cat {shlex.quote(folder + dump.name)}.* | zstd -dc | {pg_restore}"

    # Values were written so, whatever the server's own settings are.
    lines = [
        f"export PGOPTIONS={shlex.quote(' '.join(f'-c {name}={value}' for name, value in FORMAT_SETTINGS.items()))}"
    ]
    lines += [
        f"createdb --template=template0 {_create_options(facts, component.server)} -- {shlex.quote(facts.database)}"
    ]
    copy = f'zstd -dc | PGCLIENTENCODING={client_encoding(facts.encoding)} {psql} --command="$1"'
    if tables:
        lines += [
            load(" --section=pre-data --section=data"),
            # Each stream is a COPY of its own: those of one table can't be joined.
            f'rows() {{ for stream in "${{@:2}}"; do cat {shlex.quote(folder)}"$stream".* | {copy}; done; }}',
            *_rows(tables, facts.encoding),
            load(" --section=post-data"),
        ]
    else:
        lines.append(load())
    text = "\n".join(lines)
    return f"""
### {component.name}

```bash
{text}
```
"""


def _rows(streams: Sequence[Stream], encoding: str) -> list[str]:
    # The page is UTF-8, the session is not: other letters than ASCII's are escaped. The bytes of SQL_ASCII have no letters.
    quote = quoted if encoding in ("UTF8", "SQL_ASCII") else ascii_quoted
    names: dict[str, list[str]] = {}
    for stream in streams:
        if stream.table is not None:
            names.setdefault(copy_statement(stream.table, quote=quote), []).append(shlex.quote(stream.name))
    return [f"rows {shlex.quote(statement)} {' '.join(found)}" for statement, found in names.items()]


def _dump_major(facts: DatabaseFacts) -> int:
    return int(facts.dump_version.partition(".")[0] or 0)


def _create_options(facts: DatabaseFacts, server: Server | None) -> str:
    options = {
        "owner": facts.owner,
        "encoding": facts.encoding,
        "lc-collate": facts.collate,
        "lc-ctype": facts.ctype,
    }
    if facts.locale_provider == "i" and facts.locale:
        options |= {"locale-provider": "icu", "icu-locale": facts.locale}
        options |= {"icu-rules": facts.icu_rules} if facts.icu_rules else {}
    elif facts.locale_provider == "b" and facts.locale:
        options |= {"locale-provider": "builtin", "builtin-locale": facts.locale}
    elif facts.locale_provider == "c" and server is not None and server.version >= _PROVIDER_SINCE:
        options |= {"locale-provider": "libc"}  # else the destination's own, by which it may sort otherwise
    if facts.tablespace != "pg_default":
        options["tablespace"] = facts.tablespace
    return " ".join(f"--{name}={shlex.quote(value)}" for name, value in options.items())


def _volume(manifest: Manifest, component: Component) -> str:
    folder = _relative_folder(manifest, component)
    archives = " ".join(shlex.quote(folder + stream.name) for stream in component.streams)
    return f"""
### {component.name}

```bash
target=/the/directory/of/{component.name}   # change this
for archive in {archives}; do
  cat "$archive".* | zstd -dc | tar -x -p --numeric-owner --same-owner --acls --selinux --delay-directory-restore \\
    --warning=no-unknown-keyword --xattrs --xattrs-include='*' -C "$target"
done
```
"""


def _relative_folder(manifest: Manifest, component: Component) -> str:
    folder = component_folder(manifest.set_id, component.kind, component.name, component.attempt)
    return folder.removeprefix(manifest.set_id.prefix)
