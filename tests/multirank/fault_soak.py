#!/usr/bin/env python3
"""Runs every test of faults many times on a machine that is kept busy.

    fault_soak.py BUILD_DIRECTORY [--times 100] [--load N] [--load-nice N] [--only REGEX] [--list]

A test that depends on who gets the CPU first passes on an idle machine and fails on a busy one. So
this keeps the CPUs busy (`--load`, processes; by default two for each CPU, of the lowest priority) and
runs the tests with the label `fault` of BUILD_DIRECTORY one after another, each `--times` times. It
prints a line for each test:

    test_ipc_faults              100 passed    0 failed    3.9 s each at most

The output of every run that failed is printed at once, before that line. An interrupt or SIGTERM ends the soak after
the line of the test under way. Exits with 0 if no run failed, with 1 if one did or the soak was ended, with 2 if
there is no such test. A run is a failure, too, if it takes longer than the test's TIMEOUT in ctest: it is asked to
end, so that it can take away what it made, and then killed. Processes that a run leaves behind are killed, too,
whatever session they are in. A test that cannot run on this machine is skipped, and its line says so.
"""
import argparse
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

BUSY = set()  # Processes that are the load.


def fault_tests(build, only):
    """(name, command, directory, environment, seconds, status if skipped) of the fault tests."""
    text = subprocess.run(["ctest", "--test-dir", build, "--show-only=json-v1"], check=True,
                          stdout=subprocess.PIPE).stdout
    for test in json.loads(text)["tests"]:
        properties = {p["name"]: p["value"] for p in test.get("properties", [])}
        if "fault" not in properties.get("LABELS", []) or not re.search(only, test["name"]):
            continue
        if "command" not in test:
            sys.exit(f"{test['name']} has not been built in {build}")
        environment = dict(e.split("=", 1) for e in properties.get("ENVIRONMENT", []))
        yield (test["name"], test["command"], properties.get("WORKING_DIRECTORY", build),
               {**os.environ, **environment}, float(properties.get("TIMEOUT", 1500)),
               f"exit status {properties.get('SKIP_RETURN_CODE', 'none')}")


def become_parent_of_orphans():
    """What a test leaves behind becomes a child of this process, which can then find it."""
    PR_SET_CHILD_SUBREAPER = 36
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")


def children():
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return {int(pid) for pid in file.read().split()}


def end(job):
    """Ends a job that is under way, and whatever a job has left."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGTERM)
        try:
            job.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    # Each generation becomes ours when the one before it ends.
    while left := children() - BUSY:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)


def run_once(command, directory, environment, seconds, skipped):
    """("passed", "skipped" or what is to be shown of a run that failed; seconds it took)"""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        # A process group, no session: Linux shares the CPUs between sessions, whatever their nice.
        job = subprocess.Popen(command, cwd=directory, env=environment, stdout=out,
                               stderr=subprocess.STDOUT, preexec_fn=os.setpgrp)
        try:
            status = f"exit status {job.wait(timeout=seconds)}"
        except subprocess.TimeoutExpired:
            status = f"not at its end after {seconds:.0f} s"
        finally:
            end(job)
        out.seek(0)
        results = {"exit status 0": "passed", skipped: "skipped"}
        return results.get(status, f"{status}\n{out.read()}"), time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", metavar="BUILD_DIRECTORY")
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--load", type=int, default=2 * len(os.sched_getaffinity(0)))
    parser.add_argument("--load-nice", type=int, default=19)
    parser.add_argument("--only", metavar="REGEX", default="", help="names of tests")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    options = parser.parse_args()
    if options.times < 1 or options.load < 0:
        parser.error("--times must be at least 1, --load at least 0")
    tests = list(fault_tests(os.path.abspath(options.build), options.only))
    if not tests:
        print(f"no test with the label 'fault' matches '{options.only}' in {options.build}")
        return 2
    if options.list:
        print("\n".join(test[0] for test in tests))
        return 0
    print(f"{len(tests)} tests, {options.times} times each, beside {options.load} busy processes on "
          f"{len(os.sched_getaffinity(0))} CPUs, of niceness {options.load_nice}", flush=True)
    # They end by themselves, too, should this script be killed.
    spin = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    become_parent_of_orphans()
    busy = [subprocess.Popen([sys.executable, "-c", spin], preexec_fn=lambda: os.nice(options.load_nice))
            for _ in range(options.load)]
    BUSY.update(process.pid for process in busy)
    num_failed = 0
    ended = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.append(True))
    try:
        for name, *how in tests:
            results, longest = [], 0.0
            while len(results) < options.times and results[:1] != ["skipped"] and not ended:
                result, seconds = run_once(*how)
                results.append(result)
                longest = max(longest, seconds)
                if result not in ("passed", "skipped"):
                    print(f"{name} run {len(results)} failed:", flush=True)
                    print("    " + result.rstrip().replace("\n", "\n    "), flush=True)
            if not results:
                break
            if results == ["skipped"]:
                print(f"{name:28} skipped: it cannot run here", flush=True)
                continue
            failures = [result for result in results if result != "passed"]
            num_failed += len(failures)
            print(f"{name:28} {len(results) - len(failures):5} passed {len(failures):4} failed "
                  f"{longest:6.1f} s each at most", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(f"{num_failed} runs failed" + ", ended before all had run" * bool(ended))
    return 1 if num_failed or ended else 0


sys.exit(main())
