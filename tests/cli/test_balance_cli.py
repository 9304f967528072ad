#!/usr/bin/env python3
"""sluice balance from counts to placement, as a user meets it; and the counts of sluice run."""
import json
import os
import tempfile

from program import check, finish, run


def read(path):
    with open(path) as file:
        return json.load(file)


def write(path, text):
    with open(path, "w") as file:
        file.write(text if isinstance(text, str) else json.dumps(text))
    return path


def max_over_mean(slot_experts, rows, ranks):
    """Worked out here once more, from the file alone."""
    share = [rows[e] / slot_experts.count(e) for e in range(len(rows))]
    size = len(slot_experts) // ranks
    of_rank = [sum(share[e] for e in slot_experts[r * size:(r + 1) * size] if e is not None) for r in range(ranks)]
    return max(of_rank) * ranks / sum(of_rank)


with tempfile.TemporaryDirectory() as folder:
    path = lambda name: os.path.join(folder, name)  # noqa: E731
    model, counts, placement = path("model"), path("counts.json"), path("placement.json")

    # The counts of a run: every row of every layer, whatever the number of ranks.
    run("make-checkpoint", "--preset", "tiny", "--num-layers", "2", "--out", model)
    for ranks in (1, 4):
        r = run("run", "--checkpoint", model, "--layers", "all", "--ranks", ranks, "--tokens", 64 // ranks, "--routing",
                "zipf", "--repeat", "1", "--verify", "1", "--expert-rows", counts, "--json", path("run.json"))
        check(f"run --expert-rows on {ranks} ranks", r.returncode == 0, r)
        rows, layers = read(counts), read(path("run.json"))["layers"]
        check("all rows are counted", [sum(sum(s) for s in layer["steps"]) for layer in rows["layers"]] == [64 * 2] * 2
              and [layer["layer"] for layer in rows["layers"]] == [layer["layer"] for layer in layers]
              and rows["layers"][0]["steps"][0] == [n for rank in layers[0]["ranks"] for n in rank["rows_per_expert"]], r)
        first = rows if ranks == 1 else first
        check("the same counts on any number of ranks", rows == first, r)
    num = rows["num_experts"]
    r = run("balance", "--counts", counts, "--ranks", 4, "--slots", num + 8, "--out", placement)
    check("balance of a run's counts", r.returncode == 0 and "worst layer" in r.stdout, r)

    # No output takes the place of what is read, nor of another output.
    as_before = open(placement).read()
    every = ("run", "--checkpoint", model, "--layers", "all", "--ranks", 4)
    for wrong, of in ((("--placement", placement, "--expert-rows", placement), "--placement"),
                      (("--placement", placement, "--metrics", placement), "--placement"),
                      (("--metrics", path("x"), "--expert-rows", os.path.join(folder, ".", "x")), "--expert-rows")):
        r = run(*every, *wrong)
        check(f"run refuses {wrong}", r.returncode == 2 and f"is the file of {of}, which would be replaced" in r.stderr
              and open(placement).read() == as_before and not os.path.exists(path("x")), r)

    # The same run where that placement says: the same outputs, the same counts of logical experts, and the memory that
    # plan names. Slots take another expert's room on each rank.
    r = run("run", "--checkpoint", model, "--layers", "all", "--ranks", 4, "--tokens", 16, "--routing", "zipf", "--repeat",
            "1", "--verify", "4", "--placement", placement, "--expert-rows", counts, "--json", path("placed.json"))
    placed = read(path("placed.json"))["layers"] if r.returncode == 0 else []
    check("run --placement gives the same bits", r.returncode == 0 and "all within bounds" in r.stdout
          and [layer["outputs_digest"] for layer in placed] == [layer["outputs_digest"] for layer in layers]
          and len({layer["outputs_digest"] for layer in placed}) == 2, r)
    check("run --placement counts logical experts", read(counts) == first, r)
    r = run("plan", "--checkpoint", model, "--layers", "all", "--ranks", 4, "--slots", num + 8, "--tokens", 16, "--json",
            path("plan.json"))
    plan = read(path("plan.json"))
    check("plan --slots is what run takes", r.returncode == 0 and plan["slots"] == num + 8
          and f"of {(num + 8) // 4} slots" in r.stdout and placed and all(
              rank["memory"][size] == plan[size] for rank in placed[-1]["ranks"]
              for size in ("codes_bytes", "prepared_bytes", "exchange_bytes", "scratch_bytes", "total_bytes")), r)
    check("slots take room", plan["prepared_bytes"] * num == layers[-1]["ranks"][0]["memory"]["prepared_bytes"] * (num + 8),
          r)
    for ranks, message in ((2, "is for 4 ranks; there are 2"), (4, "has no layer")):
        if ranks == 4:
            write(placement, read(placement) | {"layers": read(placement)["layers"][:1]})
        r = run("run", "--checkpoint", model, "--layers", "all", "--ranks", ranks, "--tokens", 4, "--placement", placement)
        check(f"refused: a placement that {message}", r.returncode == 2 and message in r.stderr, r)
    r = run("plan", "--checkpoint", model, "--ranks", 4, "--slots", num + 1)
    check("refused: slots that do not divide", r.returncode == 2 and "num_slots" in r.stderr, r)

    # Experts that move between two calls: the same bits, and what moved in every form of the counters. Ranks that do
    # not divide the experts take slots.
    one = str(layers[0]["layer"])
    for transport, ranks, which in (("inproc", 4, "all"), ("ipc", 3, one)):
        slots = (num + 8) // ranks * ranks
        r = run("run", "--checkpoint", model, "--layers", which, "--ranks", ranks, "--transport", transport, "--tokens", 16,
                "--routing", "zipf", "--repeat", "2", "--verify", "2", "--slots", slots, "--rebalance", "--json",
                path("moved.json"), "--metrics", path("metrics"), *(("--stats",) if which == one else ()))
        if not os.path.exists(path("moved.json")):
            check(f"run --rebalance over {transport}", False, r)
            continue
        data = read(path("moved.json"))
        of_layers = data.get("layers", [data])
        with open(path("metrics")) as file:
            metrics = dict(line.rsplit(" ", 1) for line in file if not line.startswith("#"))
        check(f"run --rebalance over {transport}", r.returncode == 0 and r.stdout.count("outputs the same bits") == len(of_layers)
              and f"slots     {slots}, {slots // ranks} on each rank" in r.stdout, r)
        for layer in of_layers:
            moved, ranks_of = layer["rebalance"], [rank["rebalances"] for rank in layer["stats"]["ranks"]]
            rows = layer["stats"]["rows_per_expert"]
            check("run --rebalance: what moved", moved["same_bits"] and moved["num_experts"] > 0
                  and moved["num_experts"] == sum(n["num_received"] for n in ranks_of) == sum(n["num_sent"] for n in ranks_of)
                  and moved["bytes"] == sum(n["received_bytes"] for n in ranks_of) == sum(n["sent_bytes"] for n in ranks_of)
                  and all(n["num_rebalances"] == 1 and n["seconds"] > 0 for n in ranks_of), r)
            check("run --rebalance: rows", len(moved["repeats_us_after"]) == 2 and sum(rows) == 16 * 2 * ranks
                  and sum(moved["rows_per_rank_after"]) == sum(rows)
                  and layer["stats"]["rows_per_expert_total"] == [4 * n for n in rows]
                  and moved["rank_rows_max_over_mean_after"] == layer["stats"]["rank_rows_max_over_mean"]
                  < moved["rank_rows_max_over_mean_before"], r)
            check("run --rebalance: the placement is what balance makes", abs(moved["rank_rows_max_over_mean_after"]
                  - max_over_mean([None if e < 0 else e for e in moved["slot_experts_after"]], rows, ranks)) < 0.25, r)
            for rank, n in enumerate(ranks_of):
                labels = f'{{layer="{layer["layer"]}",rank="{rank}"}}'
                check("run --rebalance --metrics", all(float(metrics[f"sluice_{name}_total{labels}"]) == n[key] for name, key in (
                    ("rebalances", "num_rebalances"), ("rebalance_received_experts", "num_received"),
                    ("rebalance_sent_experts", "num_sent"), ("rebalance_copied_experts", "num_copied"),
                    ("rebalance_received_bytes", "received_bytes"), ("rebalance_sent_bytes", "sent_bytes"))), r)
                if which == one:
                    plural = "" if n["num_received"] == 1 else "s"
                    check("run --rebalance --stats", f"moves     rank {rank}: 1 rebalance, {n['num_received']} expert{plural} "
                          f"and {n['received_bytes']} bytes received, {n['num_sent']} and {n['sent_bytes']} sent" in r.stdout, r)
        os.remove(path("moved.json"))
    for arguments, message in ((("--rebalance",), "give --slots or --placement"),
                               (("--slots", num + 1), f"num_slots {num + 1} is no multiple of 4 ranks"),
                               (("--slots", num + 4, "--placement", placement), "--placement has a number of slots")):
        r = run("run", "--checkpoint", model, "--ranks", 4, "--tokens", 4, *arguments)
        check(f"refused: {message}", r.returncode == 2 and message in r.stderr, r)

    # A trace: the last steps decide, and what is printed is what the file says.
    drift = [[1000 if e == t else 10 + e % 3 for e in range(16)] for t in range(6)]
    write(counts, {"format": "sluice-expert-rows", "version": 1, "num_experts": 16,
                   "layers": [{"layer": 7, "steps": drift}, {"layer": 9, "steps": [[1] * 16] * 6}]})
    r = run("balance", "--counts", counts, "--ranks", 4, "--slots", 24, "--window", 2, "--out", placement, "--html",
            path("report.html"), "--json", path("balance.json"))
    written, said = read(placement), read(path("balance.json"))
    check("balance", r.returncode == 0 and written["num_slots"] == 24 and len(written["layers"]) == 2
          and "the last 2 of 6 steps" in r.stdout, r)
    seen = [sum(step[e] for step in drift[-2:]) for e in range(16)]
    slots = written["layers"][0]["slot_experts"]
    check("the placement is as good as is said", abs(max_over_mean(slots, seen, 4)
          - said["layers"][0]["after"]["max_over_mean"]) < 1e-9 and max_over_mean(slots, seen, 4) < 1.01
          < said["layers"][0]["before"]["max_over_mean"] and said["layers"][0]["rows_per_expert"] == seen, r)
    check("steps", [round(v, 9) for v in said["layers"][0]["steps"]["after"]]
          == [round(max_over_mean(slots, step, 4), 9) for step in drift], r)
    worst = max(layer["after"]["max_over_mean"] for layer in said["layers"])
    check("the printed worst", f"{worst:.3f} after" in r.stdout, r)
    with open(path("report.html")) as file:
        html = file.read()
    check("report", html.count("<svg") >= 6 and "Layer 7 over time" in html and "http" not in html, r)
    check("one host, two layers", "slots     24 on 4 ranks, 1 host: 6 on each rank" in r.stdout
          and "2 layers balanced in" in r.stdout, r)
    again = run("balance", "--counts", counts, "--ranks", 4, "--slots", 24, "--window", 2, "--previous", placement,
                "--out", path("again.json"))
    check("balanced already: nothing moves", "moves     0 experts" in again.stdout and read(path("again.json")) == written,
          again)
    r = run("balance", "--counts", counts, "--ranks", 4, "--slots", 24, "--hosts", 2, "--groups", 4, "--out", placement)
    hosts = [[{e // 4 for e in layer["slot_experts"][h * 12:(h + 1) * 12] if e is not None} for h in range(2)]
             for layer in read(placement)["layers"]]
    check("groups stay on a host", r.returncode == 0 and all(not a & b for a, b in hosts), r)

    os.symlink(counts, path("link.json"))
    before = read(counts)
    for option, files, of in (("--out", {"--out": counts}, "--counts"), ("--out", {"--out": path("link.json")}, "--counts"),
                              ("--html", {"--html": counts}, "--counts"), ("--json", {"--json": counts}, "--counts"),
                              ("--html", {"--previous": placement, "--html": placement}, "--previous"),
                              ("--out", {"--out": path("one"), "--json": path("one")}, "--json")):
        r = run("balance", "--counts", counts, "--ranks", 4, "--slots", 24, *(a for pair in files.items() for a in pair))
        check(f"{files} replaces {of}", r.returncode == 2 and f"{option} {files[option]}: is the file of {of}" in r.stderr
              and read(counts) == before and not os.path.exists(path("one")), r)
    r = run("balance", "--counts", counts, "--ranks", 4, "--slots", 24, "--previous", placement, "--out", placement)
    check("a placement goes on in its file", r.returncode == 0, r)

    wrong = {
        "num_slots 25 is no multiple of 4 ranks": ("--ranks", 4, "--slots", 25),
        "num_slots 12 is less than 16 experts": ("--ranks", 4, "--slots", 12),
        "3 hosts do not divide 4 ranks": ("--ranks", 4, "--slots", 24, "--hosts", 3),
        "layer 7: the last 7 steps of 6": ("--ranks", 4, "--slots", 24, "--window", 7),
        "num_slots 24, expected 32": ("--ranks", 4, "--slots", 32, "--previous", placement),
        "--slots is required": ("--ranks", 4),
    }
    for message, arguments in wrong.items():
        r = run("balance", "--counts", counts, *arguments)
        check(f"refused: {message}", r.returncode == 2 and message in r.stderr, r)
    write(path("old.json"), read(placement) | {"layers": read(placement)["layers"][:1]})
    r = run("balance", "--counts", counts, "--ranks", 4, "--slots", 24, "--previous", path("old.json"))
    check("refused: a layer that the placement lacks", r.returncode == 2 and "has no layer 9" in r.stderr, r)
    write(counts, read(counts) | {"rows": 1})
    r = run("balance", "--counts", counts, "--ranks", 4, "--slots", 24)
    check("refused: an unknown key", r.returncode == 3 and "key 'rows' is unknown" in r.stderr and counts in r.stderr, r)
finish()
