"""A child has an owner and an end: it dies with the operation, with the block, and with us."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from athena_backup.errors import CancelledError, FinalError
from athena_backup.operation import Operation
from athena_backup.process import STDERR_LIMIT_LINES, Ended, die_with_parent, running

ENVIRONMENT = {"PATH": os.environ["PATH"]}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_death(pid: int) -> None:
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        threading.Event().wait(0.02)


def test_output_exit_code_and_the_end_of_stderr_are_seen() -> None:
    with running(
        python("import sys; print('out'); sys.exit('broken: because')"),
        Operation(),
        environment=ENVIRONMENT,
        writes=True,
    ) as child:
        assert child.stdout.read() == b"out\n"
        ended = child.wait(Operation())
    assert ended.exit_code == 1
    assert "exit code 1: broken: because" in ended.how()


def test_a_signal_that_killed_the_child_is_named() -> None:
    with running(python("import os; os.kill(os.getpid(), 9)"), Operation(), environment=ENVIRONMENT) as child:
        assert "SIGKILL" in child.wait(Operation()).how()


def test_the_environment_is_exactly_the_one_given() -> None:
    code = "import os; print(sorted(os.environ))"
    with running(python(code), Operation(), environment={"LC_ALL": "C", "PGPASSWORD": "x"}, writes=True) as child:
        assert child.stdout.read().decode().strip() == "['LC_ALL', 'PGPASSWORD']"
        child.wait(Operation())


def test_a_cancel_ends_a_child_that_says_nothing() -> None:
    operation = Operation()
    with running(python("import time; time.sleep(1000)"), operation, environment=ENVIRONMENT, writes=True) as child:
        threading.Timer(0.2, lambda: operation.cancel("cancelled by request")).start()
        assert child.stdout.read() == b""
        pid = child.pid
        with pytest.raises(CancelledError):
            child.wait(operation)
            operation.check()
    await_death(pid)


def test_leaving_the_block_ends_the_child_and_its_own_children() -> None:
    code = "import subprocess,sys,time; p=subprocess.Popen([sys.executable,'-c','import time; time.sleep(1000)']); print(p.pid, flush=True); time.sleep(1000)"
    with running(python(code), Operation(), environment=ENVIRONMENT, writes=True) as child:
        grandchild = int(child.stdout.readline())
    await_death(child.pid)
    await_death(grandchild)


def test_a_child_dies_with_a_parent_that_is_killed() -> None:
    code = (
        "import subprocess, sys; from athena_backup.process import die_with_parent;"
        "p = subprocess.Popen(die_with_parent([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(1000)']), stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen(python(code), stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    await_death(pid)


def test_a_flood_on_stderr_takes_neither_memory_nor_the_child() -> None:
    code = "import sys\nfor i in range(200000): print('warning', i, file=sys.stderr)"
    with running(python(code), Operation(), environment=ENVIRONMENT) as child:
        ended = child.wait(Operation())
    assert ended.exit_code == 0
    assert ended.stderr[-1] == "warning 199999"
    assert len(ended.stderr) <= 2_000


def test_a_program_that_is_missing_is_named() -> None:
    with (
        pytest.raises(FinalError, match="pg_dump-of-nowhere"),
        running(["/nowhere/pg_dump-of-nowhere"], Operation(), environment={}),
    ):
        raise AssertionError("started")


def test_no_argument_of_a_command_is_lost_on_the_way() -> None:
    command = die_with_parent([sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", "", "--x=ä"])
    assert subprocess.check_output(command).decode().strip() == "['a b', '', '--x=ä']"


def test_of_what_a_child_said_only_its_own_lines_are_repeated() -> None:
    """What follows them is the row or the statement that failed."""
    said = (
        "pg_restore: from TOC entry 7; 6100 16401 SUBSCRIPTION s postgres",
        "pg_restore: error: could not execute query: ERROR:  permission denied to create subscription",
        "DETAIL:  Key (email)=(somebody@example.org) is duplicated.",
        "Command was: CREATE SUBSCRIPTION s CONNECTION 'host=pub",
        "password=hunter2' PUBLICATION p;",
    )
    assert Ended("pg_restore", 1, said).how() == (
        "pg_restore ended with exit code 1: pg_restore: from TOC entry 7; 6100 16401 SUBSCRIPTION s postgres"
        " | pg_restore: error: could not execute query: ERROR:  permission denied to create subscription"
    )


def test_of_a_statement_so_long_that_its_beginning_is_forgotten_nothing_is_repeated() -> None:
    said = tuple(f"password=hunter{number}" for number in range(STDERR_LIMIT_LINES))
    assert Ended("pg_restore", 1, said).how() == "pg_restore ended with exit code 1"


def test_who_waits_for_a_child_stops_when_he_is_told_to() -> None:
    def check() -> None:
        raise FinalError("another part failed")

    with (
        pytest.raises(FinalError, match="another part failed"),
        running(python("import time; time.sleep(600)"), Operation(), environment=ENVIRONMENT) as child,
    ):
        child.wait(Operation(), check)
    assert not is_alive(child.pid)
