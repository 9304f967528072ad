#!/usr/bin/env python3
"""A rank of a layer on CUDA, one process per rank, is killed or stopped while the layer runs.

    test_lost_rank.py SLUICE [BACKEND [TIMES]]

Every survivor must say which rank is missing within the timeout plus one second, and no process may
be left. Both fates come TIMES times (1). Exits with 77 where there is no CUDA device.
"""
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time

SLUICE = sys.argv[1]
BACKEND = sys.argv[2] if len(sys.argv) > 2 else "cuda"
TIMES = int(sys.argv[3]) if len(sys.argv) > 3 else 1
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


def start(command, env):
    """(job, what it says on a terminal that is its standard error)"""
    terminal, end = pty.openpty()
    attributes = termios.tcgetattr(end)
    attributes[1] &= ~termios.OPOST  # Lines as they are written.
    termios.tcsetattr(end, termios.TCSANOW, attributes)
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, env=env)
    os.close(end)
    return job, terminal


class Listener(threading.Thread):
    """Notes when each line comes, and when the progress line says that every rank runs the layer."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal, self.lines, self.runs = terminal, [], threading.Event()

    def run(self):
        rest = b""
        while True:
            try:
                more = os.read(self.terminal, 65536)
            except OSError:  # All writers have gone.
                more = b""
            if not more:
                break
            if b"running" in rest + more:
                self.runs.set()
            *whole, rest = (rest + more).split(b"\n")
            now = time.monotonic()
            self.lines += [(now, re.sub(r".*\r(\x1b\[K)?", "", line.decode(errors="replace")).strip()) for line in whole]
        os.close(self.terminal)


def run_case(checkpoint, how):
    env = dict(os.environ, SLUICE_TIMEOUT_MS=str(TIMEOUT_MS))
    job, terminal = start([SLUICE, "run", "--checkpoint", checkpoint, "--backend", BACKEND, "--transport", "ipc",
                           "--ranks", str(RANKS), "--tokens", "16", "--repeat", "100000"], env)
    listener = Listener(terminal)
    listener.start()
    # On a busy device processes take long to start, and a CUDA call then longer than any limit here.
    if not listener.runs.wait(timeout=100):
        job.kill()
        raise AssertionError(f"{how}: the job did not run within 100 s: {listener.lines}")
    time.sleep(0.5)  # In the middle of thousands of layers.
    ranks = children_of(job.pid)
    if len(ranks) != RANKS or job.poll() is not None:
        job.kill()
        raise AssertionError(f"{how}: the job did not run: {listener.lines}, {job.stdout.read()[-500:]}")
    began = time.monotonic()
    os.kill(ranks[VICTIM], signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    status = job.wait(timeout=60)
    listener.join()
    said = [(at - began, text) for at, text in listener.lines if "rank" in text]
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
        probe = subprocess.run([SLUICE, "run", "--checkpoint", checkpoint, "--backend", BACKEND], text=True,
                               capture_output=True)
        if "no CUDA device on this machine" in probe.stderr or "has no CUDA backend" in probe.stderr:
            print("skipped: no CUDA device on this machine")
            sys.exit(77)
        assert probe.returncode == 0, probe.stderr
        for _ in range(TIMES):
            for how in ("kill", "stop"):
                run_case(checkpoint, how)


main()
