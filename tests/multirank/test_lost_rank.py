#!/usr/bin/env python3
"""A rank of a layer on CUDA, one process per rank, is killed or stopped while the layer runs.

    test_lost_rank.py SLUICE

Every survivor must say which rank is missing within the timeout plus one second, and no process may
be left. Exits with 77 where there is no CUDA device.
"""
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

SLUICE = sys.argv[1]
RANKS, VICTIM, TIMEOUT_MS = 4, 2, 2000
LIMIT_S = TIMEOUT_MS / 1000 + 1


def children_of(pid):
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                state, parent = file.read().rsplit(")", 1)[1].split()[:2]
            with open(f"/proc/{entry}/environ") as file:
                rank = re.search(r"SLUICE_RANK=(\d+)", file.read())
        except OSError:
            continue
        if int(parent) == pid and rank:
            found[int(rank.group(1))] = int(entry)
    return found


def run_case(checkpoint, how):
    env = dict(os.environ, SLUICE_TIMEOUT_MS=str(TIMEOUT_MS))
    job = subprocess.Popen([SLUICE, "run", "--checkpoint", checkpoint, "--backend", "cuda", "--transport", "ipc",
                            "--ranks", str(RANKS), "--tokens", "16", "--repeat", "100000"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    lines = []

    def listen():
        for line in job.stderr:
            lines.append((time.monotonic(), line.strip()))
    listener = threading.Thread(target=listen)
    listener.start()
    time.sleep(8)  # Long enough to load and to be in the middle of thousands of layers.
    ranks = children_of(job.pid)
    if len(ranks) != RANKS or job.poll() is not None:
        job.kill()
        raise AssertionError(f"{how}: the job did not run: {lines}, {job.stdout.read()[-500:]}")
    began = time.monotonic()
    os.kill(ranks[VICTIM], signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    status = job.wait(timeout=60)
    listener.join()
    said = [(at - began, text) for at, text in lines if "rank" in text]
    for at, text in said:
        print(f"{how}: {at * 1000:.0f} ms: {text}")
    assert status == 4, f"{how}: exit status {status}"
    assert len(said) >= RANKS - 1, f"{how}: {RANKS - 1} survivors, {len(said)} messages"
    assert any(re.search(rf"missing rank\(s\).*\b{VICTIM}\b", text) for _, text in said), f"{how}: nobody names rank {VICTIM}"
    assert all(at <= LIMIT_S for at, _ in said), f"{how}: later than {LIMIT_S} s"
    left = [pid for pid in ranks.values() if os.path.exists(f"/proc/{pid}")]
    assert not left, f"{how}: processes left: {left}"


def main():
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = os.path.join(folder, "tiny")
        subprocess.run([SLUICE, "make-checkpoint", "--preset", "tiny", "--out", checkpoint], check=True,
                       stdout=subprocess.DEVNULL)
        probe = subprocess.run([SLUICE, "run", "--checkpoint", checkpoint, "--backend", "cuda"], text=True,
                               capture_output=True)
        if "no CUDA device on this machine" in probe.stderr or "has no CUDA backend" in probe.stderr:
            print("skipped: no CUDA device on this machine")
            sys.exit(77)
        assert probe.returncode == 0, probe.stderr
        for how in ("kill", "stop"):
            run_case(checkpoint, how)


main()
