"""The keys that may call the API: made, shown once, and kept as hashes in a Prefect block.

A key is 256 random bits, so a plain SHA-256 of it can't be searched; what is compared is always the whole hash of every
key, in constant time.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence

from prefect.blocks.core import Block
from pydantic import Field


class ApiKeys(Block):
    """SHA-256 hashes of the keys that may call the Athena API of one namespace."""

    _block_type_name = "Athena API keys"
    _block_type_slug = "athena-api-keys"

    hashes: list[str] = Field(
        default=[], description="SHA-256 of each key, in hex. The keys themselves are kept nowhere."
    )


def block_name(namespace: str) -> str:
    """The name of the namespace's block; Prefect allows lower-case letters, digits and dashes.

    A namespace with other characters bears its hash too, so that no two of them ("a.b", "a-b") share their keys.
    """
    plain = "".join(character if character.isalnum() else "-" for character in namespace.lower())
    return plain if plain == namespace else f"{plain}-{hash_of(namespace)[:12]}"


def hash_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def load_hashes(namespace: str) -> list[str]:
    """The hashes that are kept for a namespace; none where no key was made yet."""
    try:
        block = ApiKeys.load(block_name(namespace))
    except ValueError:
        return []
    return list(block.hashes) if isinstance(block, ApiKeys) else []


def make_key(namespace: str) -> str:
    """Make a key, keep its hash in place of all earlier ones, and return it: nobody can show it again."""
    key = secrets.token_urlsafe(32)
    ApiKeys(hashes=[hash_of(key)]).save(block_name(namespace), overwrite=True)
    return key


def is_known(key: str, hashes: Sequence[str]) -> bool:
    """Whether ``key`` is one of those kept; takes as long for a wrong key as for a right one."""
    digest = hash_of(key)
    matches: Iterable[bool] = [hmac.compare_digest(digest, known) for known in hashes]
    return any(matches)
