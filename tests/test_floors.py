"""The floor plan: each floor imports only from floors below it, and the engine knows neither Prefect nor the settings."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["athena_backup", "blocks", "flows", "adapter", "deployments"]
"""From the ground up."""


def modules(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


def imports(module: Path) -> set[str]:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("relative import")
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_from_floors_below_it(floor: str) -> None:
    above = FLOORS[FLOORS.index(floor) + 1 :]
    offences = [
        f"{module.relative_to(ROOT)} imports {name}"
        for module in modules(floor)
        for name in imports(module)
        if name.split(".")[0] in above or name == "relative import"
    ]
    assert modules(floor)
    assert offences == []


def test_the_engine_does_not_know_prefect() -> None:
    offences = [
        f"{module.name} imports {name}"
        for module in modules("athena_backup")
        for name in imports(module)
        if name.split(".")[0].startswith("prefect")
    ]
    assert offences == []


def test_no_engine_module_imports_the_settings() -> None:
    offences = [
        module.name
        for module in modules("athena_backup")
        if module.name != "settings.py" and any(name.startswith("athena_backup.settings") for name in imports(module))
    ]
    assert offences == []


def test_the_adapter_does_not_touch_prefects_server_or_the_engines_streams() -> None:
    streams = ("athena_backup.pipeline", "athena_backup.postgres", "athena_backup.volume", "prefect.server")
    offences = [
        f"{module.name} imports {name}"
        for module in modules("adapter")
        for name in imports(module)
        if name.startswith(streams)
    ]
    assert offences == []
