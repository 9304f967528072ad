#!/usr/bin/env python3
"""`sluice run --hosts`: virtual hosts over threads, processes and, with MPIRUN, an MPI job.

    test_hosts_cli.py SLUICE [MPIRUN [FLAGS...]]
"""
import json
import os
import re
import tempfile

from program import MPIRUN, SLUICE, check, execute as run, finish


def digest(result):
    found = re.search(r"outputs +digest (\w+)", result.stdout)
    return found and found[1]


with tempfile.TemporaryDirectory() as folder:
    model, report = os.path.join(folder, "tiny"), os.path.join(folder, "run.json")
    r = run(SLUICE, "make-checkpoint", "--preset", "tiny", "--out", model)
    check("make-checkpoint", r.returncode == 0, r)
    common = ["run", "--checkpoint", model, "--tokens", "5,0,3,1", "--ranks", "4", "--verify", "9", "--repeat", "2",
              "--json", report]
    plain = digest(run(SLUICE, *common))

    for i, mode in enumerate(("low-latency", "normal")):
        # Every recipe in one of the modes.
        for recipe in ("direct", "direct-bf16", "bf16-static", "requant-static", "static", "pow2-static", "direct-token")[i::2]:
            more = ["--prove"] if recipe in ("direct", "direct-bf16", "bf16-static", "static", "direct-token") else []
            r = run(SLUICE, *common, "--mode", mode, "--recipe", recipe, "--hosts", "2", *more)
            check(f"{mode} {recipe}", r.returncode == 0 and "all within bounds" in r.stdout
                  and "2 hosts of 2 ranks; added up in 2 parts" in r.stdout
                  and ("the same bytes" in r.stdout or not more), r)

        # The same bits for any number of hosts, and with one part those of one host.
        bits = set()
        for hosts in ("1", "2", "4"):
            r = run(SLUICE, *common, "--mode", mode, "--hosts", hosts, "--sum-parts", "4")
            check(f"{mode} {hosts} hosts in 4 parts", r.returncode == 0, r)
            bits.add(digest(r))
            r = run(SLUICE, *common, "--mode", mode, "--hosts", hosts, "--sum-parts", "1")
            check(f"{mode} {hosts} hosts in one part", r.returncode == 0 and digest(r) == plain, r)
        check(f"{mode}: the same bits", len(bits) == 1, r)

        programs = {"ipc": [SLUICE]}
        if MPIRUN:
            programs["mpi"] = [*MPIRUN, "-n", "4", SLUICE]
        for transport, program in programs.items():
            r = run(*program, *common, "--mode", mode, "--hosts", "4", "--sum-parts", "4", "--transport", transport)
            check(f"{mode} over {transport}", r.returncode == 0 and digest(r) in bits, r)

        r = run(SLUICE, *common, "--mode", mode, "--hosts", "2")
        with open(report) as file:
            data = json.load(file)
        hosts, ranks = data["hosts"], data["ranks"]
        check(f"{mode}: JSON", hosts["as_formula"] and hosts["num_hosts"] == 2 and hosts["sum_parts"] == 2, r)
        for h, traffic in enumerate(hosts["traffic"]):
            own, others = (range(0, 2), range(2, 4)) if h == 0 else (range(2, 4), range(0, 2))
            for kind in ("dispatch_bytes", "combine_bytes"):
                counted = sum(ranks[r][kind][p] for r in own for p in others)
                check(f"{mode}: {kind} of host {h}", traffic[kind] == counted > 0, r)
            check(f"{mode}: copies of host {h}", 0 < traffic["token_copies"] <= traffic["rows"], r)

    # Experts in slots, and experts that move, where bits can be compared.
    r = run(SLUICE, *common, "--hosts", "2", "--slots", "12")
    check("slots", r.returncode == 0 and "the same" in r.stdout, r)
    r = run(SLUICE, *common, "--hosts", "2", "--slots", "12", "--rebalance", "--sum-parts", "1")
    check("rebalance", r.returncode == 0, r)

    for name, arguments, text in (
            ("hosts that do not divide", ["--hosts", "3"], "hosts: 3 hosts do not divide 4 ranks"),
            ("rebalance by parts", ["--hosts", "2", "--slots", "12", "--rebalance"], "give --sum-parts 1"),
            ("parts that do not fit", ["--hosts", "4", "--sum-parts", "2"], "sum_parts 2 of 4 hosts of 1 rank"),
            ("parts of nothing", ["--sum-parts", "3"], "sum_parts 3 does not divide 8 expert slots")):
        r = run(SLUICE, *common, *arguments)
        check(name, r.returncode == 2 and text in r.stderr, r)

    # Where the ranks really are. NCCL_HOSTID makes hosts of this one.
    def on_hosts(of_rank, *arguments):
        script = f'NCCL_HOSTID=h$((OMPI_COMM_WORLD_RANK {of_rank})) exec "$@"'
        return run(*MPIRUN, "-n", "4", "bash", "-c", script, "sluice", SLUICE, *common, "--transport", "mpi", *arguments)

    if MPIRUN:
        r = on_hosts("/ 2", "--hosts", "2")
        check("hosts as they are", r.returncode == 0 and "note      the ranks" not in r.stdout, r)
        r = on_hosts("/ 2", "--hosts", "4")
        check("more hosts than there are", r.returncode == 0, r)
        r = on_hosts("% 2", "--hosts", "2")
        check("ranks in turns", r.returncode == 2
              and "--hosts 2 makes ranks 0 and 1 ranks of one host, but they are on h0 and h1" in r.stderr, r)
        r = on_hosts("% 2")
        check("hosts that nobody named", r.returncode == 0 and "note      the ranks are on 2 hosts" in r.stdout
              and "with --hosts 2 once for each host" in r.stdout, r)

finish()
