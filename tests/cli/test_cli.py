#!/usr/bin/env python3
"""The command line as a user meets it: what it prints, what it writes, how it exits."""
import json
import os
import shutil
import tempfile

from program import SLUICE, check, finish, run

with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "tiny")
    report = os.path.join(folder, "run.json")

    r = run("make-checkpoint", "--preset", "tiny", "--out", model)
    check("make-checkpoint", r.returncode == 0, r)
    r = run("make-checkpoint", "--preset", "tiny", "--out", model)
    check("make-checkpoint refuses to overwrite", r.returncode != 0 and model in r.stderr, r)
    r = run("inspect", model)
    check("inspect", r.returncode == 0 and "w4afp8" in r.stdout, r)

    # What cannot be written is said before the work, not after it.
    absent = os.path.join(folder, "absent")
    for option, command in (("--json", "inspect"), ("--metrics", "run"), ("--expert-rows", "run")):
        arguments = (model,) if command == "inspect" else ("--checkpoint", model)
        for path, reason in ((os.path.join(absent, "file"), f"no folder {absent}"), (folder, "is a directory")):
            r = run(command, *arguments, option, path)
            check(f"{option} {path}", r.returncode == 2 and option in r.stderr and reason in r.stderr
                  and "experts" not in r.stdout, r)
    r = run("run", "--checkpoint", model, "--seed", "-1")
    check("a negative seed", r.returncode == 2 and "--seed" in r.stderr and "-1 is below 0" in r.stderr, r)
    r = run("run", "--checkpoint", model, "--seed", " -1")
    check("a negative seed behind a space", r.returncode == 2 and "' -1' is not a number" in r.stderr, r)
    for option in ("--json", "--metrics", "--expert-rows"):
        r = run("run", "--checkpoint", model, option, "")
        check(f"{option} without a name", r.returncode == 2 and option in r.stderr
              and "the name of the file is empty" in r.stderr, r)

    for mode in ("low-latency", "normal"):
        for recipe in ("direct", "direct-bf16", "bf16-static", "requant-static", "static", "pow2-static",
                       "direct-token"):
            r = run("run", "--checkpoint", model, "--ranks", "4", "--tokens", "5,0,3,1", "--repeat", "2",
                    "--mode", mode, "--recipe", recipe, "--verify", "9", "--json", report)
            check(f"run {mode} {recipe}", r.returncode == 0 and "all within bounds" in r.stdout
                  and recipe in r.stdout, r)
            with open(report) as file:
                data = json.load(file)
            check(f"json {mode} {recipe}",
                  data["verify"]["passed"] and data["verify"]["rows"] == 9
                  and data["recipe"]["name"] == recipe and len(data["ranks"]) == 4, r)

    # Each activation from config.json: outputs of their own, within the bounds of its own float64 reference.
    digests = set()
    for keys, activation in (({}, "swiglu"), ({"model_type": "deepseek_v4", "swiglu_limit": 0.3}, "swiglu:limit=0.3"),
                             ({"model_type": "gpt_oss", "swiglu_limit": 0.3}, "swiglu-oai:alpha=1.702,limit=0.3"),
                             ({"hidden_act": "situ", "activation_situ_beta": 0.5, "activation_situ_linear_beta": 0.2},
                              "situ:beta=0.5,linear_beta=0.2")):
        other = os.path.join(folder, "activation")
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(model, other)
        with open(os.path.join(model, "config.json")) as file:
            config = json.load(file)
        with open(os.path.join(other, "config.json"), "w") as file:
            json.dump(config | keys, file)
        r = run("run", "--checkpoint", other, "--ranks", "2", "--tokens", "6", "--repeat", "1", "--json", report)
        with open(report) as file:
            data = json.load(file)
        named = f", activation {activation}\n" in r.stdout
        check(f"run with {activation}", r.returncode == 0 and data["verify"]["passed"]
              and data["activation"] == activation and named == (activation != "swiglu"), r)
        digests.add(data["outputs_digest"])
        r = run("plan", "--checkpoint", other, "--ranks", "2", "--tokens", "6")
        check(f"plan with {activation}", r.returncode == 0 and f", activation {activation}\n" in r.stdout, r)
    check("four activations give four outputs", len(digests) == 4, r)

    # The plan's experts are those that run then holds; the most tokens that fit do, one more does not.
    r = run("run", "--checkpoint", model, "--ranks", "4", "--tokens", "3", "--json", report)
    with open(report) as file:
        data = json.load(file)
    experts_bytes = data["experts_bytes"]
    # Of the ranks, not of the buffer of 128 MiB or more from which the read rate is measured afterwards.
    check(f"peak resident {data['peak_resident_bytes']}",
          experts_bytes < data["peak_resident_bytes"] < 100e6 and data["read_bytes_per_s"] > 0, r)
    for backend in ("cpu", "cuda"):
        for mode, recipe in (("low-latency", "direct"), ("normal", "bf16-static"), ("both", "requant-static")):
            plan = ("plan", "--config", os.path.join(model, "config.json"), "--ranks", "4", "--backend", backend,
                    "--mode", mode, "--recipe", recipe, "--memory", "3MB", "--json", report, "--tokens")
            r = run(*plan, "1")
            with open(report) as file:
                data = json.load(file)
            most = data["most_tokens_per_rank"]
            check(f"plan {backend} {mode}", r.returncode == 0 and data["fits"] and most > 1
                  and (backend == "cuda" or 4 * data["prepared_bytes"] == experts_bytes), r)
            r = run(*plan, str(most))
            with open(report) as file:
                check(f"plan: {most} tokens fit", r.returncode == 0 and json.load(file)["total_bytes"] <= 3e6, r)
            r = run(*plan, str(most + 1))
            with open(report) as file:
                check(f"plan: {most + 1} do not", r.returncode == 1 and json.load(file)["total_bytes"] > 3e6, r)
    # What run then takes on every rank is what the plan said, to the byte.
    sizes = ("codes_bytes", "scales_bytes", "prepared_bytes", "exchange_bytes", "scratch_bytes", "total_bytes")
    for transport in ("inproc", "ipc"):
        for mode, recipe, tokens in (("low-latency", "direct", "7"), ("normal", "bf16-static", "5"),
                                     ("normal", "direct", "1"), ("low-latency", "static", "64")):
            r = run("plan", "--config", os.path.join(model, "config.json"), "--ranks", "2", "--mode", mode, "--recipe",
                    recipe, "--tokens", tokens, "--json", report)
            with open(report) as file:
                plan = json.load(file)
            r = run("run", "--checkpoint", model, "--ranks", "2", "--mode", mode, "--recipe", recipe, "--tokens",
                    f"{tokens},1", "--transport", transport, "--json", report)
            with open(report) as file:
                ranks = json.load(file)["ranks"]
            check(f"run takes what plan names: {transport} {mode} {recipe}", r.returncode == 0 and len(ranks) == 2
                  and all(rank["memory"][size] == plan[size] for rank in ranks for size in sizes)
                  and "exchange " in r.stdout, r)
    r = run("plan", "--preset", "tiny", "--memory", "1MB", "--ranks", "3")
    check("plan refuses ranks that do not divide", r.returncode == 2 and "3 ranks" in r.stderr, r)
    r = run("plan", "--preset", "tiny", "--memory", "much")
    check("plan refuses a size that is none", r.returncode == 2 and "'much'" in r.stderr, r)
    # A latent width is the experts' width; other keys may be nested under any of three names.
    wide = {"model_type": None, "hidden_size": 512, "moe_intermediate_size": 128, "num_experts": 8,
            "num_experts_per_tok": 2}
    for nested in ("text_config", "language_config", "llm_config"):
        for latent in ("routed_expert_hidden_size", "moe_latent_size"):
            config = os.path.join(folder, "config.json")
            with open(config, "w") as file:
                json.dump({nested: {**wide, latent: 256}}, file)
            r = run("plan", "--config", config)
            check(f"plan of {nested}, {latent}", r.returncode == 0 and "hidden 256," in r.stdout, r)

    several = os.path.join(folder, "several")
    r = run("make-checkpoint", "--preset", "tiny", "--layers", "3", "--out", several)
    check("make-checkpoint of three layers", r.returncode == 0, r)
    # Layers share their buffers: only the experts are there for each.
    plans = {}
    for layers in ("1", "2", "3", "all", ""):
        option = ("--layers", layers) if layers == "all" else ("--num-layers", layers) if layers else ()
        r = run("plan", "--checkpoint", several, "--ranks", "2", "--mode", "both", *option, "--json", report)
        with open(report) as file:
            plan = plans[layers] = json.load(file)
        count = 3 if layers in ("all", "") else int(layers)
        check(f"plan of {layers} layers", r.returncode == 0 and plan["layers"] == count
              and all(plan[size] == plans["1"][size] for size in ("exchange_bytes", "scratch_bytes"))
              and all(plan[size] == count * plans["1"][size] for size in sizes[:3])
              and plan["total_bytes"] == sum(plan[size] for size in sizes[2:5]), r)
    # All layers on one set of buffers: each gives the bytes that it gives alone, and together they take what the plan
    # of all layers names.
    alone = {}
    for layer in ("3", "4", "5"):
        run("run", "--checkpoint", several, "--layer", layer, "--ranks", "2", "--tokens", "4,3", "--json", report)
        with open(report) as file:
            alone[int(layer)] = json.load(file)["outputs_digest"]
    run("plan", "--checkpoint", several, "--ranks", "2", "--tokens", "4", "--json", report)
    with open(report) as file:
        plan = json.load(file)
    for transport in ("inproc", "ipc"):
        r = run("run", "--checkpoint", several, "--layers", "all", "--ranks", "2", "--tokens", "4,3", "--prove",
                "--verify", "7", "--transport", transport, "--json", report)
        with open(report) as file:
            data = json.load(file)
        check(f"run of all layers over {transport}", r.returncode == 0 and "in a row  3 layers" in r.stdout
              and data["verify"]["rows"] == 21 and data["verify"]["passed"] and data["identity"]["same"]
              and len(data["pass_us"]) == 5 and data["load_us"] > 0 and "\nloaded    " in r.stdout
              and data["load"]["gbytes_per_s"] > 0 and data["load"]["prepared_bytes"] == sum(
                  rank["memory"]["prepared_bytes"] for rank in data["layers"][-1]["ranks"])
              and {layer["layer"]: layer["outputs_digest"] for layer in data["layers"]} == alone
              and len(set(alone.values())) == 3, r)
        check(f"all layers take what plan names, over {transport}", all(
            rank["memory"][size] == plan[size] for rank in data["layers"][-1]["ranks"] for size in sizes), r)
    r = run("run", "--checkpoint", several, "--layers", "5,3-4", "--tokens", "2", "--json", report)
    with open(report) as file:
        check("run of layers in the order given", [layer["layer"] for layer in json.load(file)["layers"]] == [5, 3, 4], r)
    r = run("bench", "load", "--checkpoint", several, "--layers", "3,5", "--ranks", "2", "--rank", "1", "--json", report)
    with open(report) as file:
        data = json.load(file)
    check("bench load", r.returncode == 0 and "every byte is that of mapped" in r.stdout and not r.stderr
          and data["layers"] == [3, 5] and data["num_experts"] == 4
          and data["passes"][-1]["files"] == "warm" and data["passes"][-1]["share"] > 0
          and 0 < data["slots_bytes"] and 0 < data["prepared_bytes"], r)
    for option, why in ((("--ranks", "5"), "not divisible by 5"), (("--rank", "2"), "rank 2 is not in [0, 1)")):
        r = run("bench", "load", "--checkpoint", several, *option)
        check(f"bench load refuses {option[0]}", r.returncode == 2 and why in r.stderr, r)
    for layers, why in (("4-3", "3 is before 4"), ("2", "no experts in layer 2"), ("6-9", "no experts in layer 6 to 9"),
                        ("4,3-5", "layer 4 is there twice"), ("4x", "nothing is known of 'x'"),
                        ("some", "neither 'all' nor a list")):
        r = run("run", "--checkpoint", several, "--layers", layers)
        check(f"run refuses --layers {layers}", r.returncode == 2 and f"--layers '{layers}'" in r.stderr
              and why in r.stderr, r)
    for option in (("--stats",), ("--layer", "3")):
        r = run("run", "--checkpoint", several, "--layers", "all", *option)
        check(f"run refuses --layers with {option[0]}", r.returncode == 2 and option[0] in r.stderr, r)
    # --layers is a list of numbers, to plan as to run; how many is --num-layers.
    r = run("plan", "--checkpoint", several, "--ranks", "2", "--mode", "both", "--layers", "4-5", "--json", report)
    with open(report) as file:
        check("plan of layers by number", r.returncode == 0 and json.load(file) == plans["2"], r)
    for arguments, why in ((("--checkpoint", several, "--num-layers", "4"), "--num-layers 4: "),
                           (("--checkpoint", several, "--layers", "6"), "no experts in layer 6"),
                           (("--checkpoint", several, "--layers", ""), "--layers: is empty"),
                           (("--checkpoint", several, "--layers", "3", "--num-layers", "2"), "--num-layers 2 too"),
                           (("--config", os.path.join(several, "config.json"), "--num-layers", "4"), "--num-layers 4: "),
                           (("--preset", "tiny", "--layers", "all"), "give --num-layers"),
                           (("--preset", "tiny", "--num-layers", "0"), "'0' is not a whole number in [1, "),
                           (("--preset", "tiny", "--num-layers", "2x"), "--num-layers")):
        r = run("plan", *arguments)
        check(f"plan refuses {arguments}", r.returncode == 2 and why in r.stderr, r)
    r = run("run", "--checkpoint", several, "--layers", "")
    check("run refuses --layers ''", r.returncode == 2 and "--layers: is empty" in r.stderr, r)
    # gpt-oss: fused tensors, biases, and widths that are padded inside.
    oss = os.path.join(folder, "gpt-oss")
    r = run("make-checkpoint", "--preset", "gpt-oss-20b", "--experts", "8", "--hidden", "288", "--intermediate", "160",
            "--out", oss)
    check("make gpt-oss", r.returncode == 0, r)
    r = run("run", "--checkpoint", oss, "--ranks", "2", "--tokens", "4,3", "--prove")
    check("gpt-oss agrees with float64", r.returncode == 0 and "all within bounds" in r.stdout
          and "hidden 288, intermediate 160" in r.stdout, r)
    r = run("accuracy", "--checkpoint", oss, "--tokens", "4", "--suite", "gaussian", "--recipe", "direct", "--ranks", "2")
    check("gpt-oss has a certificate that its engines keep", r.returncode == 0 and "PASS" in r.stdout, r)
    r = run("plan", "--checkpoint", oss, "--backend", "cuda", "--ranks", "2")
    check("plan refuses biases on CUDA by name", r.returncode == 2 and "gate_up_proj_bias" in r.stderr, r)
    # A rank that cannot load its experts says why, also where the others only know that it could not.
    shard = next(os.path.join(oss, f) for f in sorted(os.listdir(oss)) if f.endswith(".safetensors"))
    with open(shard, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        (name,) = [n for n in header if n.endswith("gate_up_proj_bias")]
        file.seek(8 + size + header[name]["data_offsets"][1] - 2)  # Of the last expert, on the last rank.
        file.write(b"\xc0\x7f")
    for transport in ("inproc", "ipc"):
        r = run("run", "--checkpoint", oss, "--ranks", "2", "--tokens", "4", "--transport", transport)
        check(f"the rank that cannot load says why over {transport}", r.returncode == 3
              and "gate_up_proj_bias" in r.stderr and "nan is not a finite" in r.stderr, r)
    # config.json alone has the verdict that it has beside tensors.
    config = os.path.join(folder, "alone.json")
    keys = {**wide, "num_hidden_layers": 4, "first_k_dense_replace": 1, "hidden_act": "silu"}
    for patch, expected in (({"moe_new": 1}, "moe_new = 1"), ({"num_experts_per_token": 3}, "contradicts"),
                            ({"hidden_act": "gelu"}, "hidden_act = gelu"), ({"hidden_size": 0}, "hidden_size = 0"),
                            ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'")):
        with open(config, "w") as file:
            json.dump(keys | patch, file)
        r = run("plan", "--config", config)
        check(f"plan refuses a config with {patch}", r.returncode == 2 and expected in r.stderr, r)
    with open(config, "w") as file:
        json.dump(keys | {"brand_new": 1, "model_type": "deepseek_v4", "swiglu_limit": [0, 7, 7, 0]}, file)
    r = run("plan", "--config", config, "--json", report)
    with open(report) as file:
        data = json.load(file)
    check("plan of a config's own layers", r.returncode == 0 and data["layers"] == 3 and "brand_new" in r.stdout
          and data["activations"] == ["swiglu:limit=7", "swiglu"], r)
    page = os.path.join(folder, "accuracy.html")
    r = run("accuracy", "--checkpoint", several, "--layer", "all", "--tokens", "6", "--suite", "gaussian,outliers",
            "--ranks", "2", "--budget", "100%", "--html", page, "--json", report)
    with open(report) as file:
        data = json.load(file)
    check("accuracy proves and judges every layer", all(
        one["budget"]["passed"] and one["budget"]["recipe"] == "direct" and one["budget"]["budget_percent"] == 100
        and [p["mode"] for p in one["identity"]] == ["low-latency", "normal"]
        and all(p["passed"] and p["direct"] == p["direct_bf16"] == p["definition"] for p in one["identity"])
        for one in data["layers"]), r)
    check("accuracy of all layers", r.returncode == 0 and "all 3: PASS" in r.stdout
          and [one["layer"] for one in data["layers"]] == [3, 4, 5]
          and all(one["engines"]["passed"] and one["engines"]["runs"] == 14 for one in data["layers"])
          and data["passed"] and data["worst_layer"] in (3, 4, 5) and os.path.getsize(page) > 20000, r)
    r = run("accuracy", "--checkpoint", several, "--layer", "all", "--tokens", "6", "--suite", "gaussian", "--budget",
            "0.001%")
    check("one budget for all layers", r.returncode == 1 and "FAIL: 3, 4, 5" in r.stdout, r)
    for layer, reason in (("some", "'some'"), ("7", "layer 7"), ("-1", "'-1'")):
        r = run("accuracy", "--checkpoint", several, "--layer", layer, "--tokens", "6")
        check(f"accuracy refuses layer {layer}", r.returncode == 2 and reason in r.stderr, r)
    r = run("accuracy", "--preset", "tiny", "--layer", "all")
    check("accuracy refuses layers of a preset", r.returncode == 2 and "--checkpoint" in r.stderr, r)

    r = run("run", "--checkpoint", model, "--ranks", "2", "--tokens", "4", "--prove")
    check("prove", r.returncode == 0 and "the same bytes" in r.stdout, r)
    r = run("run", "--checkpoint", model, "--recipe", "requant-static", "--prove")
    check("prove refuses two roundings", r.returncode == 2 and "rounds twice" in r.stderr, r)

    refusals = {
        "unknown recipe": (["--recipe", "dircet"], "dircet"),
        "unknown mode": (["--mode", "decode"], "decode"),
        "layer without experts": (["--layer", "77"], "layer 77"),
        "ranks that do not divide": (["--ranks", "3"], "3 ranks"),
        "tokens for other ranks": (["--ranks", "2", "--tokens", "1,2,3"], "--tokens"),
        "no token at all": (["--tokens", "0"], "no rank has a token"),
        "unknown transport": (["--transport", "shmem"], "shmem"),
    }
    for name, (arguments, text) in refusals.items():
        r = run("run", "--checkpoint", model, *arguments)
        check(name, r.returncode == 2 and text in r.stderr, r)

    # Ranks of several hosts: each thing that is missing is named, before anybody is waited for.
    launched = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    placed = launched | {"MASTER_PORT": "29500", "SLUICE_SECRET": "sixteen bytes, at least"}
    for name, arguments, env, text in (
        ("nccl on the CPU", ["--backend", "cpu"], placed, "--transport nccl moves the memory of GPUs, --backend is cpu"),
        ("nccl without a launcher", [], {}, "no launcher has given this process a rank: RANK"),
        ("nccl without a meeting place", [], launched, "SLUICE_MEETING=''"),
        ("nccl without a secret", [], launched | {"MASTER_PORT": "29500"}, "SLUICE_SECRET=''"),
        ("nccl at no port", [], placed | {"MASTER_PORT": "65535"}, "MASTER_PORT='65535'"),
        ("nccl at no address", [], placed | {"SLUICE_MEETING": "node"}, "SLUICE_MEETING: address 'node' is not"),
        ("nccl with a rank too many", [], placed | {"RANK": "4"}, "RANK='4' is not a whole number in [0, 3]"),
        # In vain on a machine with GPUs, where it would start.
        ("nccl without NCCL or GPU", [], placed, "transport 'nccl'"),
    ):
        arguments = ["--transport", "nccl", *(arguments or ["--backend", "cuda"])]
        for command in (["run", "--checkpoint", model], ["bench", "exchange"]):
            if text == "transport 'nccl'" and shutil.which("nvidia-smi"):
                continue
            r = run(*command, *arguments, env=env)
            check(f"{name}: {command[0]}", r.returncode == 2 and text in r.stderr, r)
    r = run("run", "--checkpoint", os.path.join(folder, "absent"))
    check("absent checkpoint", r.returncode == 2 and "absent" in r.stderr, r)

    # The environment: honoured where GEMM1 sees the same bytes, refused by name where it would not.
    r = run("run", "--checkpoint", model, env={"SLUICE_DISPATCH_DTYPE": "bf16"})
    check("override honoured", r.returncode == 0 and "wire bf16" in r.stdout, r)
    # A plan is of what that run would take.
    sizes = []
    for env in ({}, {"SLUICE_DISPATCH_DTYPE": "bf16"}):
        run("plan", "--checkpoint", model, "--tokens", "64", "--json", report, env=env)
        sizes.append(json.load(open(report))["exchange_bytes"])
    check("plan takes the override", sizes[1] > 1.3 * sizes[0], sizes)
    r = run("run", "--checkpoint", model, env={"SLUICE_DISPATCH_DTYPE": "fp8-static"})
    check("override refused", r.returncode == 2 and "dispatch dtype fp8-static (SLUICE_DISPATCH_DTYPE)" in r.stderr
          and "direct" in r.stderr and "low-latency" in r.stderr, r)
    r = run("run", "--checkpoint", model, env={"SLUICE_DISPATCH_DTYPE": "int8"})
    check("override unknown", r.returncode == 2 and "int8" in r.stderr, r)

    # Static scales planted wrong: one shard truncated.
    shard = next(os.path.join(model, f) for f in sorted(os.listdir(model)) if f.startswith("model")
                 and f.endswith(".safetensors"))
    with open(shard, "r+b") as file:
        file.truncate(os.path.getsize(shard) // 2)
    r = run("run", "--checkpoint", model)
    check("shard cut in half", r.returncode == 3 and os.path.basename(shard) in r.stderr, r)

# Both kinds of ranks check every element first, move the same bytes and report the same fields.
moved = {}
with tempfile.TemporaryDirectory() as folder:
    report = os.path.join(folder, "exchange.json")
    for transport in ("inproc", "ipc"):
        for mode in ("low-latency", "normal"):
            r = run("bench", "exchange", "--transport", transport, "--ranks", "3", "--tokens", "1,8", "--hidden", "256",
                    "--experts", "12", "--topk", "4", "--pairs", "2", "--repeat", "2", "--mode", mode, "--json", report)
            with open(report) as file:
                data = json.load(file)
            check(f"bench exchange {transport} {mode}", r.returncode == 0 and f"3 ranks over {transport}" in r.stdout
                  and "all equal to the definition" in r.stdout and r.stdout.count("checked") == 1
                  and all(c["checked_elements"] > 0 and c["exchange"]["dispatch_call_us"] > 0 for c in data["cases"]), r)
            moved[transport, mode] = [(c["rows"], c["checked_elements"], c["exchange"]["dispatch_bytes"],
                                       c["exchange"]["combine_bytes"], c["exchange"]["off_rank_share"])
                                      for c in data["cases"]]
    check("bench exchange: the same bytes over both", len(moved["ipc", "normal"]) == 2
          and all(moved["inproc", mode] == moved["ipc", mode] for mode in ("low-latency", "normal")), r)
r = run("bench", "exchange", "--transport", "ipc", "--ranks", "3", "--experts", "8", "--tokens", "1")
check("bench exchange ipc: refused once", r.returncode == 2
      and r.stderr.count("num_experts 8 is not a positive multiple of 3 ranks") == 1, r)
with tempfile.TemporaryDirectory() as folder:
    report = os.path.join(folder, "layer.json")
    for transport in ("inproc", "ipc"):
        r = run("bench", "layer", "--preset", "tiny", "--transport", transport, "--ranks", "2", "--tokens", "1,7",
                "--calls", "2", "--repeat", "2", "--mode", "normal", "--json", report)
        with open(report) as file:
            data = json.load(file)
        check(f"bench layer {transport}", r.returncode == 0 and "both ways, and replays, give the same bits" in r.stdout
              and [c["tokens_per_rank"] for c in data["cases"]] == [1, 7]
              and all(c["checked_elements"] == 2 * c["tokens_per_rank"] * 256 and c["layer_us"] > 0
                      for c in data["cases"]), r)
r = run("bench", "layer", "--preset", "tiny", "--transport", "ipc", "--ranks", "3", "--tokens", "1")
check("bench layer ipc: refused once", r.returncode == 2
      and r.stderr.count("8 experts are not divisible by 3 ranks") == 1, r)
r = run("bench", "experts", "--preset", "tiny", "--rows", "1,3", "--repeat", "1")
check("bench experts", r.returncode == 0 and "error/bound" in r.stdout and "of byte dot products" in r.stdout, r)
r = run("bench", "experts", "--preset", "tiny", "--rows", "3", "--repeat", "1", "--recipe", "direct-token")
check("bench experts of a recipe", r.returncode == 0 and " direct-token " in r.stdout, r)
r = run("bench", "experts", "--preset", "tiny", "--rows", "3", "--repeat", "1", "--activation", "swiglu",
        "--activation", "situ:beta=4,linear_beta=25")
check("bench experts of two activations", r.returncode == 0 and r.stdout.count(" swiglu ") > 2
      and r.stdout.count("situ:beta=4,linear_beta=25") > 2, r)
r = run("bench", "model", "--preset", "tiny", "--num-layers", "3", "--tokens", "1,7", "--repeat", "2")
check("bench model", r.returncode == 0 and "3 of 8 experts" in r.stdout and "as planned" in r.stdout
      and [line.split()[0] for line in r.stdout.splitlines()[-2:]] == ["1", "7"], r)
r = run("bench", "experts", "--activation", "gelu")
check("bench experts of an unknown activation", r.returncode == 2 and "gelu" in r.stderr, r)
finish()
