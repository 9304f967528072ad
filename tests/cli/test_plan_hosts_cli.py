#!/usr/bin/env python3
"""sluice plan --hosts and bench exchange --calibrate: what is printed, written and refused.

    test_plan_hosts_cli.py PROGRAM
"""
import json
import os
import tempfile

from program import check, finish, run

with tempfile.TemporaryDirectory() as folder:
    def path(name):
        return os.path.join(folder, name)

    def read(name):
        with open(path(name), encoding="utf-8") as file:
            return json.load(file)

    def plan(*arguments):
        r = run("--json", path("plan.json"), "plan", "--preset", "r1-layer", *arguments)
        return r, read("plan.json") if r.returncode == 0 else None

    # Both modes, several numbers of tokens; what is printed is what the file says.
    r, said = plan("--hosts", 8)
    check("plan", r.returncode == 0 and "EP64" in r.stdout and "bound     low-latency, 128 tokens: " in r.stdout, r)
    cases = {(c["mode"], c["tokens_per_rank"]): c for c in said["cases"]}
    check("cases", sorted(cases) == [("low-latency", t) for t in (1, 16, 64, 128)]
          + [("normal", t) for t in (1024, 4096)], r)
    for key, case in cases.items():
        line = next(l.split() for l in r.stdout.splitlines() if l.split()[:2] == [key[0], str(key[1])])
        check(f"printed {key}", abs(float(line[6]) - case["layer_us"]) <= 0.5 and case["bound"] in r.stdout, r)
        check(f"shares of {key}", abs(sum(case["shares"].values()) - case["layer_us"]) < 1e-6 * case["layer_us"], r)
        check(f"bytes of {key}", abs(case["network_bytes_per_host"] - 8 * (
            case["dispatch"]["network_bytes_per_rank"] + case["combine"]["network_bytes_per_rank"])) < 1, r)
    # Experts are one part, though the table has two columns of them.
    def bounds(case):
        s = case["shares"]
        return {"latency": s["latency_us"], "network": s["network_us"], "inside a host": s["link_us"] + s["memory_us"],
                "experts": s["weights_us"] + s["products_us"]}
    two, said_two = plan("--hosts", 2)
    for case in [*cases.values(), *said_two["cases"], *plan("--hosts", 1)[1]["cases"]]:
        sums = bounds(case)
        check(f"bound {case['bound']}", case["bound"].split(" (")[0] == max(sums, key=sums.get), two)
    check("bound of halves", "128 tokens: experts (weights)" in two.stdout
          and "4096 tokens: network" in two.stdout, two)
    # Nobody shall take the figures for measured ones.
    note = "a prediction: over real hosts nothing of Sluice has been timed"
    one, said_one = plan("--hosts", 1)
    check("note", f"note      {note}\n" in two.stdout and said_two["note"] == note
          and "note  " not in one.stdout and "note" not in said_one, two)
    # Memory is that of a GPU; more hosts than its exchange takes are predicted, and said to be refused.
    many, said_many = plan("--hosts", 65, "--slots", 520)
    check("memory", all(c["exchange_bytes"] > 0 and "exchange_refused" not in c for c in said["cases"])
          and "the exchange takes" in r.stdout, r)
    check("memory that is refused", all(c["exchange_bytes"] is None and "at most 64" in c["exchange_refused"]
                                        for c in said_many["cases"]) and "refused today: 65 hosts" in many.stdout, many)
    check("sensitivity", all(c["sensitivity"] for c in said["cases"]) and "+30 %" in r.stdout, r)

    # One number changed on the command line is that change in the sensitivity table.
    slow, changed = plan("--hosts", 8, "--set", f"network_gbytes_per_s={45 * 1.3}")
    rate = {key: next(s for s in c["sensitivity"] if s["parameter"] == "network_gbytes_per_s")
            for key, c in cases.items()}
    check("--set", all(abs(c["layer_us"] - cases[c["mode"], c["tokens_per_rank"]]["layer_us"]
                           - rate[c["mode"], c["tokens_per_rank"]]["more_us"]) < 1e-6 for c in changed["cases"]), slow)

    # Fewer hosts for a token: DeepSeek's groups. Other routing: Zipf, and counts.
    grouped, said_grouped = plan("--hosts", 8, "--groups", 8, "--topk-groups", 4)
    check("groups", said_grouped["routing"]["hosts_per_token"] <= 4 < said["routing"]["hosts_per_token"], grouped)
    zipf, said_zipf = plan("--hosts", 2, "--routing", "zipf")
    check("zipf", said_zipf["routing"]["standard_error"] > 0 and "16384 tokens sampled" in zipf.stdout
          and plan("--hosts", 2, "--routing", "zipf")[0].stdout == zipf.stdout, zipf)
    rows = [1000 if e < 64 else 10 for e in range(256)]
    with open(path("rows.json"), "w", encoding="utf-8") as file:
        json.dump({"format": "sluice-expert-rows", "version": 1, "num_experts": 256,
                   "layers": [{"layer": 3, "steps": [rows]}]}, file)
    counted, said_counted = plan("--hosts", 4, "--counts", path("rows.json"))
    check("counts", said_counted["routing"]["hosts_per_token"] < 2 < plan("--hosts", 4)[1]["routing"]["hosts_per_token"],
          counted)
    spread, said_spread = plan("--hosts", 4, "--counts", path("rows.json"), "--slots", 320)
    check("slots", said_spread["slots"] == 320 and said_spread["cases"][-1]["stage_us"]
          < said_counted["cases"][-1]["stage_us"], spread)

    # Slots beyond the experts; one host; fewer ranks on a host.
    r, many = plan("--hosts", 64, "--slots", 512, "--tokens", "8,64", "--mode", "low-latency")
    check("replicas", r.returncode == 0 and [c["tokens_per_rank"] for c in many["cases"]] == [8, 64], r)
    r, one = plan("--hosts", 1, "--machine", "h200-nvlink")
    check("one host", r.returncode == 0 and all(c["network_bytes_per_host"] == 0 for c in one["cases"]), r)
    r, narrow = plan("--hosts", 8, "--ranks", 8)
    check("a rank on each host", r.returncode == 0 and all(c["dispatch"]["link_us"] == 0 for c in narrow["cases"]), r)
    whole, small = plan("--hosts", 8)[1], plan("--hosts", 8, "--piece-tokens", 96)[1]
    check("smaller pieces", small["cases"][3]["dispatch"]["network_bytes_per_rank"]
          < 0.76 * whole["cases"][3]["dispatch"]["network_bytes_per_rank"]
          and small["cases"][0] == whole["cases"][0] and small["cases"][5] == whole["cases"][5], r)

    with open(path("bad.json"), "w", encoding="utf-8") as file:
        json.dump({"base": "h200-ib400", "parameters": {"speed": 1}}, file)
    refused = {
        "--ranks 12 is no multiple of --hosts 8": ("--hosts", 8, "--ranks", 12),
        "512 ranks, 8 for each of --hosts 64, do not divide 256 experts; give --ranks, or --slots, at least 512":
            ("--hosts", 64),
        "--machine 'h300' is no file, and none of: h200-ib400": ("--hosts", 2, "--machine", "h300"),
        f"--machine '{folder}' is no file, and none of: h200-ib400": ("--hosts", 2, "--machine", folder),
        "network_gbytes_per_s 0.0001 is not in 0.001 .. 1000000 GB/s":
            ("--hosts", 2, "--set", "network_gbytes_per_s=1e-4"),
        "push_gbytes_per_s 0 is not in 0.001 .. 1000000 GB/s": ("--hosts", 2, "--set", "push_gbytes_per_s=0"),
        "pull_gbytes_per_s 1e-320 is not in 0.001 .. 1000000 GB/s": ("--hosts", 2, "--set", "pull_gbytes_per_s=1e-320"),
        "parameter 'speed' is none of: network_gbytes_per_s": ("--hosts", 2, "--set", "speed=3"),
        "--set: overlap is given twice": ("--hosts", 2, "--set", "overlap=1,network_gbytes_per_s=20,overlap=0"),
        "--set 'overlap' is not NAME=NUMBER": ("--hosts", 2, "--set", "overlap"),
        "--set 'overlap=x' is not NAME=NUMBER": ("--hosts", 2, "--set", "overlap=x"),
        "overlap 2 is not in 0 .. 1": ("--hosts", 2, "--set", "overlap=2"),
        "network_gbytes_per_s is 0, num_hosts 2": ("--hosts", 2, "--machine", "h200-nvlink"),
        "num_groups 7 does not divide num_experts 256": ("--hosts", 2, "--groups", 7),
        "--routing zipf knows no groups; --groups is 8": ("--hosts", 2, "--groups", 8, "--topk-groups", 4, "--routing", "zipf"),
        "sum_parts 3 does not divide 256 expert slots": ("--hosts", 2, "--sum-parts", 3),
        "sum_parts 512 is not in [0, 256]": ("--hosts", 2, "--sum-parts", 512),
        "sum_parts 4 of 8 hosts of 8 ranks: it must be 1 or 8, or": ("--hosts", 8, "--sum-parts", 4),
        # 8 hosts, 128 tokens: 66 % of a piece are records, so 84.7.
        "piece_tokens 84 is not in 85 .. 128: of 128 tokens, 84.7 need the fullest host on average":
            ("--hosts", 8, "--piece-tokens", 84),
        "--piece-tokens 96 is for low-latency mode over several hosts; --mode normal, --hosts 8":
            ("--hosts", 8, "--piece-tokens", 96, "--mode", "normal"),
        "--piece-tokens 96 is for low-latency mode over several hosts; --mode both, --hosts 1":
            ("--hosts", 1, "--piece-tokens", 96),
        "--hosts plans the time of one layer": ("--hosts", 2, "--memory", "80GB"),
        "--num-layers plan memory": ("--hosts", 2, "--num-layers", 3),
        "are for --hosts": ("--set", "overlap=1"),
        "--tokens has 2 numbers": ("--tokens", "1,2"),
        "recipe 'x' is": ("--hosts", 2, "--recipe", "x"),
        "has no measured experts' stage": ("--hosts", 2, "--machine", "deepep-ll-h800"),
        "'speed' is none of": ("--hosts", 2, "--machine", path("bad.json")),
    }
    for message, arguments in refused.items():
        r = run("plan", "--preset", "r1-layer", *arguments)
        check(f"refused: {message}", r.returncode in (2, 3) and message in r.stderr, r)

    # The least rates, in every time and share: long times, but numbers.
    r, slowest = plan("--hosts", 8, "--set", "network_gbytes_per_s=.001,push_gbytes_per_s=.001,pull_gbytes_per_s=.001")
    check("least rates", r.returncode == 0 and "inf" not in r.stdout.split() and "nan" not in r.stdout
          and all(1e5 < c["layer_us"] < 1e10 for c in slowest["cases"]), r)
    check("least piece", plan("--hosts", 8, "--piece-tokens", 85)[0].returncode == 0, r)

    # A machine that was measured here, over threads and over processes.
    for transport in ("inproc", "ipc"):
        machine = path(f"{transport}.json")
        r = run("--json", machine, "bench", "exchange", "--calibrate", "--transport", transport, "--ranks", 2, "--tokens",
                "1,8,64", "--hidden", 1024, "--experts", 16, "--topk", 2, "--pairs", 3, "--repeat", 3, "--no-all-gather")
        if r.returncode == 2 and "the times do not grow with the bytes" in r.stderr:
            continue  # So it may be on a busy machine, and then there is no rate.
        said = read(f"{transport}.json") if r.returncode == 0 else {}
        check(f"calibrate over {transport}", set(said.get("parameters", {})) == {
            "dispatch_fixed_us", "push_gbytes_per_s", "combine_fixed_us", "pull_gbytes_per_s"}
            and said["parameters"]["push_gbytes_per_s"] > 0 and len(said["fits"]) == 2
            and all(abs(f["worst_error"]) >= f["rms_error"] - 1e-12 for f in said["fits"]), r)
        r, with_it = plan("--hosts", 2, "--machine", machine)
        check(f"plan with {transport}", r.returncode == 0 and with_it["machine"] == transport
              and all(with_it["parameters"][name] == value for name, value in said["parameters"].items()), r)
    for message, arguments in {"--calibrate needs two ranks and two numbers": ("--tokens", 4),
                               "machine 'x' is none of": ("--machine", "x")}.items():
        r = run("bench", "exchange", "--calibrate", "--ranks", 2, *arguments)
        check(f"refused: {message}", r.returncode == 2 and message in r.stderr, r)
finish()
