"""Ours against every peer: ``make bench``, with SIZE=small in some minutes, or some cases only, as below.

    python -m benchmarks.peers --size small --only databases --rounds 1

Data sets stay in the cache for the next time; everything else is taken away. What was measured stays too, so that a report
can be written again (``--report``) and a case measured anew beside the others.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from benchmarks.cases import CASES, SIZES, Bench
from benchmarks.installing import install, versions
from benchmarks.report import report
from benchmarks.results import load

_HERE = Path(__file__).parent


def main() -> int:
    """Entry point; the exit code is 0 if every run succeeded and was proven."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--contenders", nargs="+", default=[], metavar="PART", help="those whose name has one of these")
    parser.add_argument("--rounds", type=int, help="default: 3, of the small size 1")
    parser.add_argument(
        "--cold", action="store_true", help="empty the page cache before each run (as root), not fill it"
    )
    parser.add_argument("--cache", type=Path, default=_HERE / "data", help="where data sets and peers stay")
    parser.add_argument("--output", type=Path, help="the report; default: RESULTS.md, of the small size in the cache")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report again")
    asked = parser.parse_args()
    cache: Path = asked.cache.absolute()
    output = asked.output or (_HERE / "RESULTS.md" if asked.size == "large" else cache / "RESULTS-small.md")
    cache.mkdir(parents=True, exist_ok=True)
    results = load(asked.size, cache / f"results-{asked.size}.json")
    if asked.report and not results.runs:
        parser.error("nothing was measured yet")
    if not asked.report:
        # As Ctrl-C does: everything that was started is stopped.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        rounds = asked.rounds or (3 if asked.size == "large" else 1)
        tools = install(cache)
        work = cache / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        results.machine |= {"programs": ", ".join(f"{name} {one}" for name, one in versions(tools).items())}
        results.machine["page cache"] = "emptied before each run" if asked.cold else "filled before each run"
        bench = Bench(SIZES[asked.size], cache / asked.size, work, tools, results, rounds, asked.cold, asked.contenders)
        os.chdir(work)
        try:
            for case in asked.only:
                began = time.perf_counter()
                print(f"{case} ...", flush=True)
                CASES[case](bench)
                print(f"{case} took {time.perf_counter() - began:.0f} s", flush=True)
        finally:
            os.chdir(cache)
            shutil.rmtree(work, ignore_errors=True)
            results.save()
    output.write_text(report(results))
    print(f"written: {output}")
    return 1 if any(run.usage is None for run in results.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
