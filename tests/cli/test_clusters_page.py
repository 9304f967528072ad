#!/usr/bin/env python3
"""Runs every command of docs/clusters.md and compares what it prints with what the page shows.

    test_clusters_page.py PROGRAM PAGE           exit status 0 if all are the same
    test_clusters_page.py PROGRAM PAGE --write   puts into the page what the commands print

A command is a line of an indented block that begins with `$ sluice`; what it prints are the lines of
the block behind it. Lines longer than the page's 120 columns cannot be shown, so there are none.
"""
import shlex
import subprocess
import sys

program, page = sys.argv[1:3]
with open(page, encoding="utf-8") as file:
    lines = file.read().split("\n")

out, failures, commands, i = [], 0, 0, 0
while i < len(lines):
    out.append(lines[i])
    if lines[i].startswith("    $ sluice "):
        command = lines[i][len("    $ sluice "):]
        i += 1
        shown = []
        while i < len(lines) and lines[i].startswith("    "):
            shown.append(lines[i][4:])
            i += 1
        result = subprocess.run([program, *shlex.split(command)], capture_output=True, text=True, timeout=120)
        printed = [line.rstrip() for line in result.stdout.rstrip("\n").split("\n")]
        commands += 1
        if result.returncode != 0 or (printed != shown and "--write" not in sys.argv):
            failures += 1
            print(f"FAILED: sluice {command}: exit status {result.returncode}{result.stderr}")
            for one, other in zip(printed, shown):
                if one != other:
                    print(f"  prints {one}\n  shown  {other}")
                    break
        wide = [line for line in printed if len(line) > 116]
        if wide:
            failures += 1
            print(f"FAILED: {len(wide)} lines of sluice {command} are wider than a page: {wide[0]}")
        out += ["    " + line if line else "" for line in printed]
    else:
        i += 1

if "--write" in sys.argv:
    with open(page, "w", encoding="utf-8") as file:
        file.write("\n".join(out))
print(f"{commands} commands, {failures} failures")
sys.exit(1 if failures or not commands else 0)
