#!/usr/bin/env python3
"""Every fault at every place, over processes: who says what, and how long after the fault.

    fault_matrix.py [--short] [--hosts] FAULT_RANK MPIRUN [FLAGS...]
    fault_matrix.py [--short] [--hosts] --transport ipc FAULT_RANK

--hosts: the cells of kill, stop and slow with the four ranks on two virtual hosts. A survivor names
rank 2 with its host.

Prints a table in Markdown. Exits with 1 if a survivor did not report an error that names rank,
operation and epoch within the timeout plus one second, counted from the fault or, on a rank that
came later to the call in which it failed, from there. So, too, if it names any other rank than the one
that was killed or stopped or sent a wrong message, if anything hung, or if a process or a
shared-memory file was left behind.

"hello": the first words of the victim come to ranks 0 and 1, not to 3. "half-communicator": the victim is lost when it
has its communicator, which others have, too, and rank 0 has not. "kill, 3 late": rank 3 comes to the place of the
fault later than the others. Nobody may name it.

A busy machine keeps processors from ranks, and then a rank is late that should not be. Each rank says for how
long its threads stood ready in vain. A cell that fails by its time, or because a rank that should come did not
come in time, by no more than some rank waited for a processor, shows nothing: it runs again, up to ten times, and
a line says so. It has failed if none of these shows anything.
"""
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ARGUMENTS = sys.argv[1:]
SHORT = ARGUMENTS[0] == "--short"
ARGUMENTS = ARGUMENTS[SHORT:]
HOSTS = ARGUMENTS[0] == "--hosts"
ARGUMENTS = ARGUMENTS[HOSTS:]
IPC = ARGUMENTS[:2] == ["--transport", "ipc"]
FAULT_RANK, *MPIRUN = ARGUMENTS[2 * IPC:]
RANKS, VICTIM, LATE, ROUND = 4, 2, 3, 3
TIMEOUT_MS = 2000
LIMIT_MS = TIMEOUT_MS + 1000
LATE_MS = TIMEOUT_MS * 3 // 10

# (fault, place, what the message of a survivor must match, who must report; None = the survivors)
GONE = rf"missing rank\(s\)(?:[^:]*\b){VICTIM}\b"
PLACES = {"start": r"start of the MPI transport", "hello": r"second roll call of the MPI transport",
          "communicator": r"second roll call of the MPI transport", "half-communicator": r"second roll call of the MPI transport",
          "before-creation": r"creation, comparing configurations: all_gather number \d+", "creation": r"creation.*make_window number \d+",
          "before-dispatch": r"dispatch.*epoch 4", "dispatch": r"dispatch.*epoch 4",
          "before-combine": r"combine, epoch 4", "combine": r"combine, epoch 4",
          "after-combine": r"dispatch.*epoch 5",
          "before-rebalance": r"rebalance of moving layer, comparing configurations: all_gather number \d+",
          "rebalance": r"rebalance of moving layer.*round \d+",
          "after-rebalance": r"dispatch.*epoch 5"}
if IPC:
    # A rank whose process has ended is noticed by whoever waits, for whomever.
    PLACES = {"start": r"start of the ipc transport",
              "before-creation": PLACES["before-creation"],
              "creation": rf"({PLACES['before-creation']}|{PLACES['creation']})",
              "before-dispatch": r"(combine, epoch 3|dispatch.*epoch 4)", "dispatch": PLACES["dispatch"],
              "before-combine": r"(dispatch|combine).*epoch 4", "combine": r"(dispatch|combine).*epoch 4",
              "after-combine": r"(combine, epoch 4|dispatch.*epoch 5)",
              "before-rebalance": rf"({PLACES['before-rebalance']}|combine, epoch 4)", "rebalance": PLACES["rebalance"],
              "after-rebalance": rf"({PLACES['before-rebalance']}|dispatch.*epoch 5)"}
CASES = [(fault, place, f"{operation}.*{GONE}", mode)
         for fault in ("kill", "stop", f"kill, {LATE} late", f"stop, {LATE} late") for place, operation in PLACES.items()
         for mode in ("low-latency", "normal")
         if place != "hello" or "late" not in fault]  # Rank 3 has nobody to greet after the victim.
CASES += [("slow", place, None, mode) for place in PLACES for mode in ("low-latency", "normal")]
# The others have given up their goodbyes when rank 2 says its own.
CASES += [] if IPC else [("slow", "end", None, mode) for mode in ("low-latency", "normal")]
for mode in ("low-latency", "normal"):
    for place in () if IPC else ("dispatch", "combine"):
        # A bad message is named by the operation that meets it, which may be the one before.
        CASES += [("truncate", place, rf"(dispatch|combine).*epoch 4.*from rank {VICTIM}: message number \d+ has", mode),
                  ("corrupt", place, rf"(dispatch|combine).*epoch 4.*from rank {VICTIM}: message number \d+: checksum", mode),
                  ("lose", place, rf"epoch 4.*from rank {VICTIM}: message number \d+ where|{place}.*epoch 4.*{GONE}", mode)]
    CASES += [("order", "dispatch", rf"epoch.*(missing rank|different calls)", mode),
              ("capacity", "creation", rf"ranks disagree on max_tokens_per_rank: rank 0 has '8', rank {VICTIM} has '9'", mode)]
CASES += [] if IPC else [("stranger", "start", rf"ranks disagree on version: rank \d has 'sluice [\d.]+', rank {VICTIM} has 'sluice 9.9.9'", "normal"),
          ("flood", "put", rf"sending on rank \d: after {TIMEOUT_MS} ms \d+ messages to rank {VICTIM} .*{GONE}", "normal")]
if HOSTS:
    # Steps of the two levels have names of their own, so a survivor may be at any of one operation.
    at_host = rf"missing rank\(s\)(?:[^:]*\b){VICTIM}(?: on host 1\b|.*rank {VICTIM} on host 1\b)"
    CASES = [(fault, place, pattern and pattern.replace(GONE, at_host), mode) for fault, place, pattern, mode in CASES
             if place in ("before-dispatch", "dispatch", "before-combine", "combine", "after-combine")
             and fault.split(",")[0] in ("kill", "stop", "slow")]
if SHORT and HOSTS:
    CASES = [c for c in CASES if c[0] in ("kill", "stop") and (c[1], c[3]) in (("dispatch", "low-latency"), ("combine", "normal"))]
elif SHORT:
    CASES = [c for i, c in enumerate(CASES) if (c[0] in ("truncate", "corrupt", "lose", "order", "capacity", "stranger", "flood")) and c[3] == "normal"
             or c[0] in ("kill", "stop") and (c[1], c[3]) in (("start", "normal"), ("hello", "normal"), ("half-communicator", "normal"), ("creation", "normal"), ("dispatch", "low-latency"), ("combine", "normal"), ("rebalance", "normal"))
             or c[0] == f"kill, {LATE} late" and (c[1], c[3]) in (("communicator", "normal"), ("before-creation", "normal"), ("dispatch", "low-latency"), ("before-combine", "normal"))
             or c[0] == "slow" and (c[1], c[3]) in (("dispatch", "low-latency"), ("end", "normal"))]


def take_own_shared_memory():
    """Goes on in a /dev/shm of its own where the system lets it, so that a file of another job is not taken for ours."""
    enter = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    if os.environ.get("FAULT_MATRIX_HAS_OWN_SHM") or not shutil.which("unshare"):
        return
    if subprocess.run([*enter, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        os.environ["FAULT_MATRIX_HAS_OWN_SHM"] = "1"
        os.execvp(enter[0], [*enter, sys.executable, *sys.argv])


def shared_files():
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def mapped_files():
    """Names in /dev/shm that some process maps: those of other jobs are not left behind."""
    names = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/maps") as file:
                names.update(re.findall(r"/dev/shm/(\S+)", file.read()))
        except OSError:
            pass  # It has ended, or is another user's.
    return names


def leftovers(before):
    """Files that are not in `before` and that nobody maps, for a second at least."""
    left = shared_files() - before
    deadline = time.monotonic() + 1
    while left and time.monotonic() < deadline:
        left &= shared_files() - mapped_files()
        time.sleep(0.1)
    return left


def run_until_judged(case):
    again = []
    for _ in range(10):
        *result, starved = run_case(case)
        if starved is None:
            break
        again.append(f"{' '.join(case[:2])} {case[3]}: ranks stood ready up to {starved} ms without a processor, so that "
                     f"this shows nothing: {result[3][0]}")
    return *result, again


def run_case(case):
    fault, place, pattern, mode = case
    launcher = [] if IPC else [*MPIRUN, "--enable-recovery", "-n", str(RANKS)]
    fault, late = fault.split(",")[0], fault.endswith("late")
    command = [*launcher, FAULT_RANK, *(["--hosts", "2"] if HOSTS else []), "--fault", fault, "--at", place, "--mode", mode,
               *(["--late", str(LATE)] if late else []), "--timeout-ms", str(TIMEOUT_MS), "--transport", "ipc" if IPC else "mpi"]
    with tempfile.NamedTemporaryFile("w") as out, tempfile.TemporaryFile("w+") as err:
        job = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        hung = wait_for(job, out.name, RANKS - (fault in ("kill", "stop", "flood")), fault in ("stop", "flood"))
        err.seek(0)
        return judge(case, read(out.name), err.read(), hung, children_of(job.pid))


def read(path):
    with open(path) as file:
        return file.read()


def wait_for(job, out, num_reports, is_stopped):
    """Ends the job; true if it had to be ended by force where it should have ended by itself."""
    deadline = time.monotonic() + 45
    while job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        if is_stopped and read(out).count("fault_rank") > num_reports:
            break
    hung = job.poll() is None and not is_stopped
    if job.poll() is None:
        # mpirun waits for a stopped rank for ever: ending that one is up to whoever stopped it.
        time.sleep(0.8)
        for pid in children_of(job.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # It has ended since.
    try:
        job.wait(timeout=20)
    except subprocess.TimeoutExpired:
        hung = True
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    return hung


def children_of(pid):
    """Processes of our program that mpirun `pid` started and that are still there."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        if parent == pid:
            found.append(int(entry))
    return found


def judge(case, out, err, hung, left):
    fault, place, pattern, mode = case
    limit = LIMIT_MS + LATE_MS * fault.endswith("late")
    began = [int(m) for m in re.findall(r"fault_rank began at (\d+)", out)]
    found = re.findall(r"fault_rank (\d+): at (\d+) in a call since (\d+) waited (\d+) \[([^\]]*)\] ranks([ \d]*): ?(.*)", out)
    reports = {int(r): (int(at), int(since), code, [int(n) for n in ranks.split()], text)
               for r, at, since, _, code, ranks, text in found}
    wrong, late_by = [], []  # The second: of each thing that is wrong because somebody was late, by how much.
    if hung:
        wrong.append("hung")
    if left:
        wrong.append(f"processes left: {left}")
    if not began:
        wrong.append("the fault did not strike")
    survivors = [r for r in range(RANKS) if r != VICTIM]
    times = []
    for r in survivors:
        if r not in reports:
            wrong.append(f"rank {r} said nothing")
            continue
        at, since, code, ranks, text = reports[r]
        if pattern is None:
            if code != "ok":
                wrong.append(f"rank {r}: [{code}] {text}")
                if code == "peer timeout":
                    late_by.append(TIMEOUT_MS // 2)  # Rank 2 comes half a timeout late on purpose.
            if place == "end" and not {f"rank {n} left MPI" for n in (r, VICTIM)} <= set(out.splitlines()):
                wrong.append(f"rank {r} or {VICTIM} does not say that it left MPI: {out}")
            continue
        if began:
            times.append(at - began[0])
            # A rank that began its call after the fault has the time of that call, and in all twice the time.
            took = at - max(began[0], since)
            if took > limit or at - began[0] > 2 * limit:
                late_by.append(max(took - limit, at - began[0] - 2 * limit))
                wrong.append(f"rank {r}: {at - began[0]} ms after the fault, limit {2 * limit}, and {at - since} ms in "
                             f"its call, limit {limit}")
        # A rank that stops because another survivor stopped first must name somebody, too; the
        # victim is named by at least one.
        if code not in ("peer timeout", "transport error"):
            wrong.append(f"rank {r}: [{code}] {text}")
        if not re.search(r"rank", text):
            wrong.append(f"rank {r} names nobody: {text}")
        is_named = fault.split(",")[0] in ("kill", "stop") or f"from rank {VICTIM}: message" in text
        if is_named and ranks != [VICTIM]:
            wrong.append(f"rank {r} names {ranks}, not {[VICTIM]}: {text}")
            if code == "peer timeout":  # Others, who had their time to come.
                time_to_come = int(re.search(r"after (\d+) ms|$", text).group(1) or TIMEOUT_MS)
                late_by.append(max(0, time_to_come - LATE_MS * case[0].endswith("late")))
    if pattern and not any(re.search(pattern, reports[r][4]) for r in survivors if r in reports):
        wrong.append("no survivor says what happened: " + "; ".join(
            f"{r}: {reports[r][4]}" for r in survivors if r in reports))
    example = next((reports[r][4] for r in survivors
                    if r in reports and pattern and re.search(pattern, reports[r][4])), "all finish, all rows right")
    seen = f"{min(times)}-{max(times)}" if times else "-"
    waited = max((int(w) for _, _, _, w, _, _, _ in found), default=0)
    # Nobody reaches the place of the fault, or says what should be said, once somebody was late.
    follows = sum(w.startswith(("no survivor says", "the fault did not strike")) for w in wrong)
    is_starved = late_by != [] and len(late_by) + follows == len(wrong) and max(late_by) <= waited
    return case, seen, example, wrong, err, waited if is_starved else None


def main():
    take_own_shared_memory()
    before = shared_files()
    bad = 0
    print("| fault | where | mode | ms to error, first-last survivor | what a survivor says |")
    print("|---|---|---|---|---|")
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        for case, seen, example, wrong, err, again in pool.map(run_until_judged, CASES):
            for line in again:
                print(f"again {line}", flush=True)
            fault, place, _, mode = case
            print(f"| {fault} | {place} | {mode} | {seen} | {example[:150]} |", flush=True)
            if wrong:
                bad += 1
                print(f"FAILED {fault} {place} {mode}: " + "\n    ".join(wrong) + "\n" + err, flush=True)
    left = leftovers(before)
    if left:
        bad += 1
        print(f"FAILED left in /dev/shm: {sorted(left)}")
    print(f"\n{len(CASES)} cells, {bad} failed; timeout {TIMEOUT_MS} ms, limit {LIMIT_MS} ms")
    sys.exit(1 if bad else 0)


main()
