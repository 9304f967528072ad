"""What the scripts of this folder share: the program under test, their checks, and how they end.

A script is a test of its own: `script.py SLUICE [MPIRUN [FLAGS...]]`.
"""
import os
import subprocess
import sys

SLUICE, *MPIRUN = sys.argv[1:]
failures = []


def execute(*command, env=None):
    """Any program, with `env` beside the variables that there are."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, **(env or {})})


def run(*arguments, env=None):
    """`sluice` with these arguments."""
    return execute(SLUICE, *arguments, env=env)


def check(name, ok, result=None):
    """result: of the program that should have done it, shown if it has not."""
    if ok:
        return
    failures.append(name)
    said = f": exit {result.returncode}\n{result.stdout}{result.stderr or ''}" if result else ""
    print(f"FAILED {name}{said}")


def finish():
    print(f"{len(failures)} failures")
    sys.exit(1 if failures else 0)
