"""The documents say what is: every setting is described, every command and target that is named exists."""

import re
from pathlib import Path

from athena_backup.manifest import json_schema
from athena_backup.settings import Settings
from deployments.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_setting_of_ours_is_described_in_the_readme() -> None:
    ours = {name.upper() for name in Settings.model_fields if not name.startswith(("aws_", "azure_", "gcp_"))}
    assert {name for name in ours if name not in README} == set()


def test_every_command_that_the_readme_names_exists() -> None:
    commands = {
        command.name or (command.callback.__name__ if command.callback else "") for command in app.registered_commands
    }
    named = set(re.findall(r"athena-backup (\w+)", README))
    assert named <= commands
    assert commands <= named | {"init"}


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake (demo|test|install|check|bench|run)\b", README)) <= targets


def test_the_pins_hold_hashes_and_no_address() -> None:
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert "://" not in pins
    assert "--index" not in pins
    for block in re.split(r"\n(?=\S)", pins.strip()):
        assert "==" in block.splitlines()[0]
        assert "--hash=sha256:" in block


def test_the_published_schema_is_that_of_the_manifest() -> None:
    """Written anew by `make schema`."""
    assert (ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8") == json_schema()
