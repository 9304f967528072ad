#!/usr/bin/env python3
"""`sluice run` over processes: the bytes of threads, one voice, and errors that name the rank."""
import json
import os
import tempfile
import time

from program import MPIRUN, SLUICE, check, execute as run, finish

WIRE = {"direct": 256 + 8, "direct-bf16": 512, "bf16-static": 512, "requant-static": 256 + 8,
        "static": 256, "pow2-static": 256 + 8, "direct-token": 256 + 4}
RANKS, EXPERTS, TOPK, HIDDEN = 4, 8, 2, 256


def processes(*parts, flags=(), env=None):
    """mpirun with one program, or several separated by ':' as [(how many, arguments), ...]."""
    command = [*MPIRUN, *flags]
    for i, (count, arguments) in enumerate(parts):
        command += ([":"] if i else []) + ["-n", str(count), SLUICE, *arguments]
    return run(*command, env=env)


def check_formula(name, mode, recipe, data, result):
    """Bytes of docs/exchange.md, summed over peers, for each rank's own share where it is known."""
    token = WIRE[recipe]
    for rank, part in enumerate(data["ranks"]):
        rows, sent = part["dispatch_rows"], part["dispatch_bytes"]
        for peer in range(RANKS):
            if mode == "low-latency":
                expected = rows[peer] * (token + 4) + EXPERTS * 4
            else:
                expected = rows[peer] * (token + 4 + 4 * TOPK) + 4
            check(f"{name}: dispatch bytes {rank} -> {peer}", sent[peer] == expected, result)
            check(f"{name}: what the transport put {rank} -> {peer}",
                  part["transport_bytes"][peer] == sent[peer] + part["combine_bytes"][peer], result)
        owed = sum(part["rows_per_expert"])
        check(f"{name}: combine bytes of {rank}", sum(part["combine_bytes"]) == owed * 2 * HIDDEN, result)


with tempfile.TemporaryDirectory() as folder:
    model, other = os.path.join(folder, "tiny"), os.path.join(folder, "other")
    report, metrics = os.path.join(folder, "run.json"), os.path.join(folder, "metrics.txt")
    for path, seed in ((model, "1"), (other, "2")):
        r = run(SLUICE, "make-checkpoint", "--preset", "tiny", "--seed", seed, "--out", path)
        check("make-checkpoint", r.returncode == 0, r)
    common = ["run", "--checkpoint", model, "--tokens", "5,0,3,1", "--verify", "9"]

    for mode in ("low-latency", "normal"):
        for recipe in WIRE:
            arguments = [*common, "--repeat", "2", "--mode", mode, "--recipe", recipe, "--json", report]
            if recipe not in ("requant-static", "pow2-static"):
                arguments.append("--prove")
            outcome = {}
            for transport in ("inproc", "mpi", "ipc"):
                name = f"{transport} {mode} {recipe}"
                extra = [*arguments, "--transport", transport, "--ranks", str(RANKS)]
                r = processes((RANKS, extra)) if transport == "mpi" else run(SLUICE, *extra)
                check(name, r.returncode == 0 and "all within bounds" in r.stdout, r)
                check(f"{name}: one voice", r.stdout.count("ranks     4 over " + transport) == 1, r)
                with open(report) as file:
                    data = json.load(file)
                check_formula(name, mode, recipe, data, r)
                outcome[transport] = (data["outputs_digest"], data.get("identity"),
                                      [p["rows_per_expert"] for p in data["ranks"]])
            check(f"{mode} {recipe}: the same bytes over all", outcome["inproc"] == outcome["mpi"] == outcome["ipc"], r)

    # Latency and rate of the transport, as numbers of a machine that plan takes.
    machine = os.path.join(folder, "machine.json")
    calibrate = ["--json", machine, "bench", "exchange", "--calibrate", "--transport", "mpi", "--ranks", "2",
                 "--tokens", "1,8,64", "--hidden", "1024", "--experts", "16", "--topk", "2", "--pairs", "3",
                 "--repeat", "3", "--no-all-gather"]
    # On a busy machine times need not grow with the bytes, and the command says that there is no rate.
    def is_measured(r):
        return r.returncode == 0 or "the times do not grow with the bytes" not in r.stderr

    r = processes((2, calibrate))
    if is_measured(r):
        check("calibrate", r.returncode == 0 and r.stdout.count("fit       ") == 2, r)
        r = run(SLUICE, "plan", "--preset", "r1-layer", "--hosts", "2", "--machine", machine)
        check("plan with it", r.returncode == 0 and "machine   machine: " in r.stdout, r)
    # Processes that say they are on hosts of their own: one line, of the network. Some here, some there: refused.
    apart = ["env", "NCCL_HOSTID=other", SLUICE, *calibrate]
    r = run(*MPIRUN, "-n", "1", SLUICE, *calibrate, ":", "-n", "1", *apart)
    if is_measured(r):
        check("calibrate apart", r.returncode == 0, r)
        with open(machine) as file:
            parameters = json.load(file)["parameters"]
        check("calibrate a network", set(parameters) == {"network_latency_us", "network_gbytes_per_s"}, r)
    calibrate[calibrate.index("--ranks") + 1] = "4"
    r = run(*MPIRUN, "-n", "3", SLUICE, *calibrate, ":", "-n", "1", "env", "NCCL_HOSTID=other", SLUICE, *calibrate)
    check("refused: two hosts of four ranks", r.returncode == 2 and "4 ranks are on 2 hosts" in r.stderr, r)

    # Over ipc sluice starts its own processes, unless a launcher did; each cause is said once.
    ipc = ["run", "--checkpoint", model, "--tokens", "4", "--transport", "ipc"]
    r = run(SLUICE, *ipc, "--ranks", "3")
    check("ipc: refused once", r.returncode == 2 and r.stderr.count("8 experts are not divisible by 3 ranks") == 1, r)
    r = processes((2, ipc))
    check("ipc under mpirun", r.returncode == 0 and "2 over ipc" in r.stdout, r)
    r = processes((2, [*ipc, "--ranks", "4"]))
    check("ipc: ranks and processes differ", r.returncode != 0 and "--ranks 4 over ipc: the job has 2 processes" in r.stderr, r)

    # What --stats prints, --json holds and --metrics writes.
    r = processes((RANKS, [*common, "--repeat", "2", "--transport", "mpi", "--stats", "--metrics", metrics,
                           "--json", report]))
    check("stats", r.returncode == 0 and "waited ms" in r.stdout and "values saturated" in r.stdout
          and "in 4 processes" in r.stdout, r)
    with open(report) as file:
        data = json.load(file)
    stats = data["stats"]
    check("stats in json", stats["imbalance_max_over_mean"] >= 1
          and sum(stats["rows_per_expert"]) == sum(sum(p["combine_rows"]) for p in stats["ranks"]) // 2
          and all(len(p["wait_ns"]) == RANKS for p in stats["ranks"]), r)
    with open(metrics) as file:
        lines = [line for line in file.read().splitlines() if not line.startswith("#")]
    samples = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    for rank, part in enumerate(stats["ranks"]):
        for peer in range(RANKS):
            label = f'{{layer="3",rank="{rank}",peer="{peer}"}}'
            check("metrics are the counters",
                  samples.get("sluice_dispatch_bytes_total" + label) == part["dispatch_bytes"][peer]
                  and samples.get("sluice_combine_rows_total" + label) == part["combine_rows"][peer], r)
    # Counters only grow: two repeats are twice one.
    r = processes((RANKS, [*common, "--repeat", "4", "--transport", "mpi", "--json", report]))
    with open(report) as file:
        four = json.load(file)["stats"]
    check("counters only grow",
          all(b["dispatch_bytes"] == [2 * n for n in a["dispatch_bytes"]]
              for a, b in zip(stats["ranks"], four["ranks"])), r)

    # Every rank finds the same fault: said once. One rank finds it: named. Ranks differ: both named.
    mpi = [*common, "--transport", "mpi"]
    r = processes((RANKS, [*mpi, "--recipe", "dircet"]))
    check("the same fault everywhere", r.returncode == 2 and r.stderr.count("dircet") == 1, r)
    r = processes((RANKS, [*mpi, "--ranks", "3"]))
    check("another number of ranks", r.returncode == 2 and "4 processes" in r.stderr, r)
    r = processes((2, mpi), (1, [*mpi, "--layer", "77"]), (1, mpi))
    check("a fault of one rank", r.returncode == 2 and "rank 2: " in r.stderr
          and "layer 77" in r.stderr, r)
    differences = {
        "checkpoint identity (config and headers)": ["--checkpoint", other],
        "low-latency recipe": ["--recipe", "static"],
        "routed_scaling_factor": ["--routed-scaling-factor", "2.5"],
        "--tokens": ["--tokens", "5,0,3,7"],
        "--routing": ["--routing", "zipf"],
        "--seed": ["--seed", "2"],
        "--repeat": ["--repeat", "4"],
        "--prove": ["--prove"],
    }
    for field, arguments in differences.items():
        changed = [a for a in mpi]
        if arguments[0] in changed:
            changed[changed.index(arguments[0]) + 1] = arguments[1]
        else:
            changed += arguments
        r = processes((3, mpi), (1, changed))
        check(f"ranks disagree on {field}", r.returncode == 4 and r.stderr.count("ranks disagree") == 1
              and f"disagree on {field}: rank 0 has" in r.stderr and "rank 3 has" in r.stderr, r)
finish()
