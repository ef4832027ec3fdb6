"""One look of `athena-backup check`: what was looked at, and what was seen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from athena_backup.errors import AthenaError, fault_of

Mark = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One look. A ``note`` asks for something that no backup or restore depends on."""

    subject: str
    mark: Mark
    text: str

    @property
    def good(self) -> bool:
        """Whether a backup would work as far as this look can tell."""
        return self.mark != "FAIL"

    def __str__(self) -> str:
        return f"{self.mark:<4}  {self.subject}: {self.text}"


@dataclass(frozen=True)
class Note:
    """What a look returns in place of a text where it has something to ask for."""

    text: str


def look(subject: str, see: Callable[[], str | Note]) -> Finding:
    """What ``see`` returns, or the error that it raises, as a finding."""
    try:
        seen = see()
    except AthenaError as error:
        return Finding(subject, "FAIL", str(error))
    except OSError as error:
        return Finding(subject, "FAIL", fault_of(error).cause)
    return Finding(subject, "note", seen.text) if isinstance(seen, Note) else Finding(subject, "ok", seen)
