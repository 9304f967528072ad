#!/usr/bin/env python3
"""What `sluice inspect` answers: does a checkpoint run, how, and is it sound. usage: test_inspect_cli.py SLUICE"""
import json
import os
import struct
import tempfile

from program import check, finish, run


def make(folder, name, *arguments):
    path = os.path.join(folder, name)
    r = run("make-checkpoint", "--preset", "tiny", "--out", path, *arguments)
    check(f"make {name}", r.returncode == 0, r)
    return path


def inspect(path):
    report = path + ".json"
    r = run("inspect", path, "--json", report)
    with open(report, encoding="utf-8") as file:
        return r, json.load(file)


def map_scales(path, part, change):
    """Applies `change` to every F32 scale of the tensors whose name contains `part`."""
    shard = os.path.join(path, "model-00001-of-00001.safetensors")
    with open(shard, "rb") as file:
        data = bytearray(file.read())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    count = 0
    for name, tensor in json.loads(data[8:begin]).items():
        if part in name and name.endswith("weight_scale_inv"):
            for i in range(begin + tensor["data_offsets"][0], begin + tensor["data_offsets"][1], 4):
                struct.pack_into("<f", data, i, change(struct.unpack_from("<f", data, i)[0]))
                count += 1
    assert count > 0, part
    with open(shard, "wb") as file:
        file.write(data)


def lines_of(result, word):
    return [line for line in result.stdout.splitlines() if line.startswith(word + ": ")]


def rename(path, old, new):
    """Gives one tensor another name of the same length, in the header alone."""
    assert len(old) == len(new)
    shard = os.path.join(path, "model-00001-of-00001.safetensors")
    with open(shard, "rb") as file:
        data = file.read()
    assert data.count(old.encode()) == 1
    with open(shard, "wb") as file:
        file.write(data.replace(old.encode(), new.encode()))
    index = os.path.join(path, "model.safetensors.index.json")
    with open(index, encoding="utf-8") as file:
        text = file.read()
    with open(index, "w", encoding="utf-8") as file:
        file.write(text.replace(old, new))


def sound(folder):
    model = make(folder, "w4afp8", "--layers", "3")
    r, data = inspect(model)
    check("sound", r.returncode == 0 and data["runs"] and data["warnings"] == [] and data["errors"] == []
          and "3 of 3 layers can be run" in r.stdout and "activation swiglu" in r.stdout, r)
    check("recipes", len(data["recipes"]) == 1 and data["recipes"][0]["layers"] == [3, 4, 5]
          and "pow2-static" in data["recipes"][0]["recipes"] and data["recipes"][0]["recommended"] == "direct"
          and data["recipes"][0]["static_scales"] == "calibrated", r)
    check("codes", data["codes"]["minus_eight"] == 0 and data["codes"]["cuda_code"] == "sign-magnitude"
          and data["codes"]["looked_at"] == 3 * 8 * 3 * 256 * 128, r)
    check("ranks", [m["ranks"] for m in data["memory"]] == [1, 2, 4, 8], r)
    for m in data["memory"]:
        report = os.path.join(folder, "plan.json")
        r = run("plan", "--checkpoint", model, "--layers", "all", "--ranks", str(m["ranks"]), "--tokens", "128",
                "--backend", "cuda", "--json", report)
        with open(report, encoding="utf-8") as file:
            plan = json.load(file)
        check(f"memory of {m['ranks']} ranks is the plan's", plan["total_bytes"] == m["total_bytes"]
              and plan["prepared_bytes"] == m["prepared_bytes"], r)
    r, data = inspect(make(folder, "kimi-int4", "--format", "kimi-int4"))
    check("no static scales", r.returncode == 0 and data["recipes"][0]["recipes"] == ["direct", "direct-bf16", "direct-token"]
          and data["recipes"][0]["static_scales"] == "none", r)


def limited(folder):
    model = make(folder, "limited", "--layers", "3")
    path = os.path.join(model, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config |= {"model_type": "deepseek_v4", "swiglu_limits": [0, 0, 0, 0, 0.3, 0]}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    r, data = inspect(model)
    check("activations by layer", r.returncode == 0 and data["activation"] == "swiglu"
          and data["activations"] == [{"layers": [3, 5], "activation": "swiglu"},
                                      {"layers": [4], "activation": "swiglu:limit=0.3"}]
          and "activation layers 3, 5: swiglu\n" in r.stdout
          and "activation layers 4: swiglu:limit=0.3\n" in r.stdout, r)
    # Engines and certificate take the layer's, not the first one's.
    r = run("accuracy", "--checkpoint", model, "--layer", "4", "--tokens", "16", "--suite", "gaussian", "--recipe",
            "direct", "--backend", "cpu")
    check("accuracy of a layer with a limit of its own", r.returncode == 0 and "PASS" in r.stdout, r)


def without_factor(folder):
    model = make(folder, "without-factor")
    path = os.path.join(model, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    for model_type, notes in (("deepseek_v3", ["note: config.json: no routed_scaling_factor, which deepseek_v3 defines; "
                                               "taken as 1"]), ("mixtral", [])):
        with open(path, "w", encoding="utf-8") as file:
            json.dump({k: v for k, v in config.items() if k != "routed_scaling_factor"} | {"model_type": model_type}, file)
        r, data = inspect(model)
        check(f"{model_type} without a factor", r.returncode == 0 and data["runs"] and lines_of(r, "note") == notes
              and data["routed_scaling_factor"] == 1 and len(data["warnings"]) == len(notes), r)


def faulty(folder):
    scaled = make(folder, "scaled", "--layers", "3")
    map_scales(scaled, "layers.4.", lambda s: s * 118)
    r, data = inspect(scaled)
    warnings = {w["kind"]: w for w in data["warnings"]}
    check("a layer 118 times too large runs and is named", r.returncode == 0 and data["runs"]
          and set(warnings) == {"weight-size", "layer-sizes"} and "layers.4." in warnings["layer-sizes"]["tensor"]
          and warnings["layer-sizes"]["severity"] == "warning" and len(lines_of(r, "warning")) == 2, r)
    broken = make(folder, "broken", "--layers", "3")
    map_scales(broken, "layers.5.", lambda s: float("nan"))
    r, data = inspect(broken)
    check("one layer cannot be loaded", r.returncode == 3 and not data["runs"] and len(lines_of(r, "error")) == 1
          and "layer 5" in lines_of(r, "error")[0] and "2 of 3 layers can be run" in r.stdout
          and data["recipes"][0]["layers"] == [3, 4], r)
    renamed = make(folder, "renamed", "--layers", "3")
    rename(renamed, "layers.5.mlp.experts.0.gate_proj.weight_scale_inv", "layers.5.mlp.experts.0.gate_proj.weight_scale_abs")
    r, data = inspect(renamed)
    check("a layer that is not supported is not called corrupt", r.returncode == 2 and not data["runs"]
          and "2 of 3 layers can be run" in r.stdout and "corrupt" not in r.stdout + r.stderr, r)
    map_scales(broken, "layers.", lambda s: float("nan"))
    r = run("inspect", broken)
    check("no layer can be loaded", r.returncode == 3 and "format    w4afp8" in r.stdout
          and "weight_scale_inv" in r.stderr, r)


def unreadable(folder):
    """A file beside the index that is empty or cut in half."""
    model = make(folder, "unreadable")
    path = os.path.join(model, "act_scales.safetensors")
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    whole = struct.pack("<Q", len(header)) + header + bytes(8)
    end = " and is left out; model.safetensors.index.json does not name it"
    for size, reason in ((0, "0 bytes; a safetensors file has at least 8"),
                         (len(whole) // 2, "header length 54 is above 27 (what is left of the file; truncated?)")):
        with open(path, "wb") as file:
            file.write(whole[:size])
        r, data = inspect(model)
        check(f"a file cut to {size} bytes is named first", r.returncode == 0 and data["runs"]
              and lines_of(r, "warning") == [f"warning: act_scales.safetensors: cannot be read ({reason}){end}"]
              and data["warnings"][0]["kind"] == "unreadable-file"
              and data["warnings"][0]["tensor"] == "act_scales.safetensors", r)
    with open(os.path.join(model, "zzz.safetensors"), "wb"):
        pass
    r, data = inspect(model)
    check("two such files are one warning", r.returncode == 0 and len(lines_of(r, "warning")) == 1
          and lines_of(r, "warning")[0].endswith(end + " (2 files like this)") and data["warnings"][0]["count"] == 2, r)


with tempfile.TemporaryDirectory() as folder:
    sound(folder)
    limited(folder)
    faulty(folder)
    without_factor(folder)
    unreadable(folder)
finish()
