#!/usr/bin/env python3
"""Runs every test of faults many times on a machine that is kept busy.

    fault_soak.py BUILD_DIRECTORY [--times 100] [--jobs N] [--load N] [--load-nice N] [--only REGEX] [--list]

A test that depends on who gets the CPU first passes on an idle machine and fails on a busy one. So
this keeps the CPUs busy (`--load`, processes; by default two for each CPU, of the lowest priority) and
runs the tests with the label `fault` of BUILD_DIRECTORY one after another, each `--times` times, or `--jobs` runs at
once where there are CPUs for them. It prints a line for each test:

    test_ipc_faults              100 passed    0 failed    3.9 s each at most

The output of every run that failed is printed at once, before that line. An interrupt or SIGTERM ends the soak after
the line of the test under way. Exits with 0 if no run failed, with 1 if one did or the soak was ended, with 2 if
there is no such test. A run is a failure, too, if it takes longer than the test's TIMEOUT in ctest: it is asked to
end, so that it can take away what it made, and then killed. Processes that a run leaves behind are killed, too,
whatever session they are in. A test that cannot run on this machine is skipped, and its line says so.
"""
import argparse
import concurrent.futures
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

MARK = "SLUICE_FAULT_SOAK_RUN"  # In the environment of a run's processes, whoever started them.


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


def left_by(run):
    """Living children of this process that carry the mark of `run`: what the processes of a job leave comes to us."""
    for task in os.listdir("/proc/self/task"):
        for pid in map(int, content(f"/proc/self/task/{task}/children").split()):
            if f"{MARK}={run}".encode() in content(f"/proc/{pid}/environ").split(b"\0"):
                yield pid


def content(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""  # Of a thread or a process that has ended.


def end(job, run):
    """Ends a job that is under way, and whatever the job has left."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGTERM)
        try:
            job.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    # Each generation becomes ours when the one before it ends.
    while left := list(left_by(run)):
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)


def run_once(command, directory, environment, seconds, skipped, run):
    """("passed", "skipped" or what is to be shown of a run that failed; seconds it took)"""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        # A process group, no session: Linux shares the CPUs between sessions, whatever their nice.
        job = subprocess.Popen(command, cwd=directory, env={**environment, MARK: str(run)}, stdout=out,
                               stderr=subprocess.STDOUT, preexec_fn=os.setpgrp)
        try:
            status = f"exit status {job.wait(timeout=seconds)}"
        except subprocess.TimeoutExpired:
            status = f"not at its end after {seconds:.0f} s"
        finally:
            end(job, run)
        out.seek(0)
        results = {"exit status 0": "passed", skipped: "skipped"}
        return results.get(status, f"{status}\n{out.read()}"), time.monotonic() - begin


def run_unless_over(ended, skipped, number, name, *how):
    """What run_once() says of run `number` of a test; nothing once the soak has ended or the test cannot run here."""
    if ended.is_set() or name in skipped:
        return None
    result, seconds = run_once(*how, run=f"{name}-{number}")
    if result == "skipped":
        skipped.add(name)
    elif result != "passed":
        print(f"{name} run {number} failed:\n    " + result.rstrip().replace("\n", "\n    "), flush=True)
    return result, seconds


def line_of(name, runs):
    """Prints the line of a test whose runs are over; how many of them failed."""
    runs = [run for run in runs if run]
    results = [result for result, _ in runs if result != "skipped"]
    num_failed = sum(result != "passed" for result in results)
    if results:
        print(f"{name:28} {len(results) - num_failed:5} passed {num_failed:4} failed "
              f"{max(seconds for _, seconds in runs):6.1f} s each at most", flush=True)
    elif runs:
        print(f"{name:28} skipped: it cannot run here", flush=True)
    return num_failed


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", metavar="BUILD_DIRECTORY")
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--load", type=int, default=2 * len(os.sched_getaffinity(0)))
    parser.add_argument("--load-nice", type=int, default=19)
    parser.add_argument("--only", metavar="REGEX", default="", help="names of tests")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    options = parser.parse_args()
    if options.times < 1 or options.jobs < 1 or options.load < 0:
        parser.error("--times and --jobs must be at least 1, --load at least 0")
    tests = list(fault_tests(os.path.abspath(options.build), options.only))
    if not tests:
        print(f"no test with the label 'fault' matches '{options.only}' in {options.build}")
        return 2
    if options.list:
        print("\n".join(test[0] for test in tests))
        return 0
    print(f"{len(tests)} tests, {options.times} times each, {options.jobs} at once, beside {options.load} busy processes on "
          f"{len(os.sched_getaffinity(0))} CPUs, of niceness {options.load_nice}", flush=True)
    # They end by themselves, too, should this script be killed.
    spin = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    become_parent_of_orphans()
    busy = [subprocess.Popen([sys.executable, "-c", spin], preexec_fn=lambda: os.nice(options.load_nice))
            for _ in range(options.load)]
    ended, skipped = threading.Event(), set()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        with concurrent.futures.ThreadPoolExecutor(max_workers=options.jobs) as pool:
            # In the order of the runs, so that one test after another comes to its end.
            rows = [(test[0], [pool.submit(run_unless_over, ended, skipped, number, *test)
                               for number in range(1, options.times + 1)]) for test in tests]
            num_failed = sum(line_of(name, [run.result() for run in runs]) for name, runs in rows)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(f"{num_failed} runs failed" + ", ended before all had run" * ended.is_set())
    return 1 if num_failed or ended.is_set() else 0


sys.exit(main())
