#!/usr/bin/env python3
"""Layouts and `sluice convert` as a user meets them: named, run, converted, killed and run again."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time

from program import SLUICE, check, finish, run


def digests(folder):
    result = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            result[name] = hashlib.sha256(file.read()).hexdigest()
    return result


def named_and_run(folder):
    """Every INT4 layout runs; floats say what to do; static recipes need static scales."""
    recognised = {"w4afp8": "w4afp8", "compressed-tensors": "compressed-tensors", "kimi-int4": "compressed-tensors",
                  "angelslim": "angelslim", "modelopt-w4a8-awq": "modelopt-w4a8-awq", "fp8-block": "fp8-block",
                  "bf16": "bf16"}
    for layout, name in recognised.items():
        model = os.path.join(folder, layout)
        r = run("make-checkpoint", "--preset", "tiny", "--format", layout, "--out", model)
        check(f"make {layout}", r.returncode == 0, r)
        report = os.path.join(folder, "inspect.json")
        r = run("inspect", model, "--json", report)
        check(f"inspect {layout}", r.returncode == 0 and f"format    {name} (" in r.stdout, r)
        with open(report, encoding="utf-8") as file:
            data = json.load(file)
        is_int4 = layout not in ("fp8-block", "bf16")
        check(f"inspect {layout} json", data["format"] == name and data["weight_format"] == ("int4" if is_int4 else None)
              and "gate_proj" in data["evidence"])
        r = run("run", "--checkpoint", model, "--ranks", "2", "--tokens", "5", "--verify", "4", "--prove")
        if is_int4:
            check(f"inspect {layout} nibbles", data["layers"][0]["nibbles"]["borne_out"])
            check(f"run {layout}", r.returncode == 0 and "all within bounds" in r.stdout
                  and "the same bytes" in r.stdout, r)
        else:
            check(f"run {layout} refused", r.returncode == 2 and "sluice convert" in r.stderr and layout in r.stderr, r)
    kimi = os.path.join(folder, "kimi-int4")
    r = run("run", "--checkpoint", kimi, "--recipe", "bf16-static")
    check("static recipe without static scales", r.returncode == 2 and "bf16-static" in r.stderr
          and "none are given for model.layers.3.mlp.experts;" in r.stderr, r)
    for layout, group in (("compressed-tensors", 128), ("kimi-int4", 32)):
        report = os.path.join(folder, "plan.json")
        r = run("plan", "--config", os.path.join(folder, layout, "config.json"), "--ranks", "2", "--json", report)
        check(f"plan {layout}", r.returncode == 0 and f"float32 scale per {group}, activation swiglu\n" in r.stdout, r)
    # Scales in bf16, as Kimi's are: the plan of a checkpoint is what run takes of it.
    narrow = os.path.join(folder, "kimi-bf16")
    r = run("make-checkpoint", "--preset", "tiny", "--format", "kimi-int4", "--scale-dtype", "bf16", "--out", narrow)
    check("make kimi bf16", r.returncode == 0, r)
    r = run("plan", "--checkpoint", narrow, "--ranks", "2", "--tokens", "3", "--json", report)
    with open(report, encoding="utf-8") as file:
        plan = json.load(file)
    r = run("run", "--checkpoint", narrow, "--ranks", "2", "--tokens", "3", "--json", report)
    with open(report, encoding="utf-8") as file:
        memory = json.load(file)["ranks"][1]["memory"]
    check("plan of a checkpoint", plan["scale_dtype"] == "bfloat16" and plan["group_size"] == 32
          and all(plan[size] == memory[size] for size in memory), r)
    for arguments, text in ((("--preset", "tiny", "--checkpoint", narrow), "give one of"),
                            (("--checkpoint", narrow, "--scale-dtype", "f32"), "--scale-dtype f32")):
        r = run("plan", *arguments)
        check(f"plan refuses {arguments[0]}", r.returncode == 2 and text in r.stderr, r)
    r = run("accuracy", "--checkpoint", kimi, "--tokens", "16", "--suite", "gaussian")
    check("accuracy in groups of 32", r.returncode == 0 and "direct" in r.stdout, r)


def converted(folder):
    kimi, int4, bf16 = (os.path.join(folder, name) for name in ("kimi-int4", "w4afp8", "bf16"))
    to = os.path.join(folder, "to")
    refusals = {
        "groups of 32 in w4afp8": (["--from", kimi, "--format", "w4afp8"], "groups of 32"),
        "no rule": (["--from", bf16, "--format", "w4afp8"], "amax7, amax8 or mse"),
        "rule for int4": (["--from", int4, "--format", "w4afp8", "--scale", "mse"], "nothing is quantized"),
        "scales that bf16 rounds": (["--from", int4, "--format", "w4afp8", "--scale-dtype", "bf16"], "not a bfloat16"),
        "experts backwards": (["--from", int4, "--format", "w4afp8", "--experts", "5:2"], "--experts '5:2'"),
        "experts past the end": (["--from", int4, "--format", "w4afp8", "--experts", "5:99"], "[0, 8)"),
        "experts that are no range": (["--from", int4, "--format", "w4afp8", "--experts", "5"], "--experts '5'"),
        "unknown format": (["--from", int4, "--format", "gguf"], "gguf"),
    }
    for name, (arguments, text) in refusals.items():
        r = run("convert", "--to", to, *arguments)
        check(f"convert refuses {name}", r.returncode == 2 and text in r.stderr and not os.path.exists(to), r)
    awq = os.path.join(folder, "awq")
    r = run("make-checkpoint", "--preset", "tiny", "--format", "modelopt-w4a8-awq", "--pre-quant-scale", "--out", awq)
    check("make awq", r.returncode == 0 and "cannot be run" in r.stdout, r)
    r = run("inspect", awq)
    check("inspect names awq and what is wrong with it", r.returncode == 2 and "modelopt-w4a8-awq (" in r.stdout
          and "gate_proj.pre_quant_scale" in r.stderr and "--drop-input-scales" in r.stderr, r)
    for name, source, arguments, why in (
            ("awq", awq, ("--drop-input-scales",), "pre_quant_scale"),
            ("kimi", kimi, (), "groups of 32 become groups of 128")):
        anew, report = os.path.join(folder, "anew-" + name), os.path.join(folder, "anew.json")
        r = run("convert", "--from", source, "--to", anew, "--format", "w4afp8", "--scale", "mse", *arguments,
                "--json", report)
        check(f"convert {name} anew", r.returncode == 0 and "a second rounding" in r.stdout and why in r.stdout, r)
        with open(report, encoding="utf-8") as file:
            data = json.load(file)
        check(f"convert {name} anew json", data["verified"] and data["requantized"]
              and why in data["requantized_because"] and 0.01 < data["relative_error"] < 0.15, r)
        r = run("run", "--checkpoint", anew, "--ranks", "2", "--tokens", "4", "--prove")
        check(f"run {name} anew", r.returncode == 0 and "all within bounds" in r.stdout, r)
    report = os.path.join(folder, "convert.json")
    r = run("convert", "--from", bf16, "--to", to, "--format", "w4afp8", "--scale", "mse", "--json", report)
    check("convert states its rule", r.returncode == 0 and "least squared error" in r.stdout
          and "relative L2" in r.stdout, r)
    with open(report, encoding="utf-8") as file:
        data = json.load(file)
    check("convert json", data["complete"] and data["verified"] and data["requantized"]
          and data["scale_rule"] == "mse" and data["weights_compared"] == 8 * 3 * 256 * 128)
    r = run("run", "--checkpoint", to, "--ranks", "2", "--tokens", "4")
    check("run what was converted", r.returncode == 0 and "all within bounds" in r.stdout, r)
    # Against the weights it was made of: the weights' error in the output is near that of the weights.
    r = run("accuracy", "--checkpoint", to, "--original", bf16, "--tokens", "16", "--suite", "gaussian", "--ranks",
            "2", "--recipe", "direct", "--json", report)
    with open(report, encoding="utf-8") as file:
        certified = json.load(file)
    error = certified["suites"][0]["recipes"][0]["roundings"]["weights"]
    check("accuracy against the original", r.returncode == 0 and f"original  {bf16} (bf16)" in r.stdout
          and certified["original_weights"] == f"{bf16} (bf16)" and 1 < error / data["relative_error"] < 2.5, r)
    r = run("accuracy", "--checkpoint", to, "--original", os.path.join(folder, "absent"))
    check("accuracy without its original", r.returncode == 2 and "absent" in r.stderr, r)
    r = run("accuracy", "--preset", "tiny", "--original", bf16)
    check("a preset has no other original", r.returncode == 2 and "--original" in r.stderr, r)
    for part in ("4:8", "0:4"):
        r = run("convert", "--from", int4, "--to", to + "-parts", "--format", "compressed-tensors", "--experts", part)
        check(f"convert --experts {part}", r.returncode == 0, r)
        check("an unfinished result is not there", os.path.exists(to + "-parts") == (part == "0:4"), r)


def killed(folder):
    """Memory of about one expert; kill -9 anywhere, run again: the same bytes."""
    model, whole, cut = (os.path.join(folder, name) for name in ("large", "whole", "cut"))
    report = os.path.join(folder, "large.json")
    r = run("make-checkpoint", "--preset", "tiny", "--format", "bf16", "--experts", "48", "--hidden", "1024",
            "--intermediate", "768", "--out", model)
    check("make large", r.returncode == 0, r)
    arguments = ["convert", "--from", model, "--format", "compressed-tensors", "--scale", "amax7",
                 "--shard-bytes", "20000000"]
    r = run(*arguments, "--to", whole, "--json", report)
    check("convert large", r.returncode == 0, r)
    with open(report, encoding="utf-8") as file:
        data = json.load(file)
    # One expert: 4.7 MB as bf16, 9.4 MB as float32. All: 226 MB and 453 MB.
    check(f"peak resident {data['peak_resident_bytes']}", data["peak_resident_bytes"] < 40e6)
    # And where bits are kept: 1.2 MB of codes and scales, on both sides; all: 58 MB, twice.
    r = run("convert", "--from", whole, "--to", whole + "-back", "--format", "w4afp8", "--json", report)
    check("convert large back", r.returncode == 0 and "bit for bit" in r.stdout, r)
    with open(report, encoding="utf-8") as file:
        peak = json.load(file)["peak_resident_bytes"]
    check(f"peak resident of an exact conversion {peak}", peak < 30e6)
    num_kills = 0
    for share in (0.1, 0.3, 0.2, 0.5, 0.7, 0.9):
        process = subprocess.Popen([SLUICE, *arguments, "--to", cut], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(share * data["seconds"])
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        num_kills += process.returncode == -signal.SIGKILL
    check(f"killed {num_kills} times", num_kills > 0)
    if not os.path.isdir(cut):  # A slow moment may have let one run through.
        r = run(*arguments, "--to", cut)
        check("finished at last", r.returncode == 0 and "48 written, 0 found finished" not in r.stdout, r)
    check("the same bytes", os.path.isdir(cut) and digests(cut) == digests(whole))
    check("nothing left behind", not [name for name in os.listdir(folder) if name.startswith(".")])
    sums = os.path.join(cut, "SHA256SUMS")
    with open(sums, encoding="utf-8") as file:
        lines = dict(reversed(line.split()) for line in file)
    check("SHA256SUMS", lines == {name: digest for name, digest in digests(cut).items() if name != "SHA256SUMS"})


def at_once(folder):
    """The same conversion in several processes: one finishes it, the others say so, and no file is half of one."""
    source, whole, to = (os.path.join(folder, name) for name in ("w4afp8", "at-once-whole", "at-once"))
    arguments = ["convert", "--from", source, "--format", "compressed-tensors"]
    r = run(*arguments, "--to", whole)
    check("convert alone", r.returncode == 0, r)
    for _ in range(6):
        runs = [subprocess.Popen([SLUICE, *arguments, "--to", to], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 text=True) for _ in range(4)]
        said = [process.communicate(timeout=100) for process in runs]
        codes = [process.returncode for process in runs]
        # A process that the system starts late finds the result, and is refused as ever.
        late = sum("already holds a checkpoint" in error for _, error in said)
        check(f"conversions at once: {codes}, {said}", codes.count(0) == 4 - late and codes.count(2) == late
              and sum("\nverified  " in out for out, _ in said) == 1
              and sum("finished by another run" in out for out, _ in said) == 3 - late)
        check("conversions at once: the same bytes", os.path.isdir(to) and digests(to) == digests(whole))
        check("conversions at once: nothing left", not [name for name in os.listdir(folder) if name.startswith(".")])
        shutil.rmtree(to, ignore_errors=True)


def cut_while_it_is_read(folder):
    """A shard that becomes shorter under a command: a message that names it, and no signal, wherever it is."""
    whole, source, to = (os.path.join(folder, name) for name in ("large", "large-cut", "large-to"))
    r = run("make-checkpoint", "--preset", "tiny", "--experts", "24", "--hidden", "1024", "--intermediate", "2048",
            "--out", whole)
    check("make large", r.returncode == 0, r)
    shard = next(name for name in os.listdir(whole) if name.startswith("model-"))
    work = os.path.join(folder, ".large-to.converting")
    kinds = set()
    for _ in range(20):
        shutil.copytree(whole, source)
        process = subprocess.Popen([SLUICE, "convert", "--from", source, "--to", to, "--format", "compressed-tensors",
                                    "--no-verify"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        journal = os.path.join(work, "sluice-convert.journal")
        while process.poll() is None and (not os.path.exists(journal) or os.path.getsize(journal) < 200):
            time.sleep(0.001)
        os.truncate(os.path.join(source, shard), 70000)
        _, error = process.communicate(timeout=100)
        is_over = process.returncode == 0  # It had read everything.
        check(f"cut while it is read: exit {process.returncode}, {error}", is_over or process.returncode == 3
              and error.startswith(f"sluice: corrupt file: {source}/{shard}: ") and error.count("\n") == 1
              and "bytes are left" in error)
        if not is_over:
            kinds.add("by signal" if "it became shorter while it was read" in error else "by check")
        for path in (source, to, work):
            shutil.rmtree(path, ignore_errors=True)
        if "by signal" in kinds:
            break
    check(f"cut while it is read: {kinds}", "by signal" in kinds)
    # The signal of somebody else ends the program as it did.
    process = subprocess.Popen([SLUICE, "bench", "experts", "--backend", "cpu"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    process.send_signal(signal.SIGBUS)
    check("SIGBUS from outside", process.wait(timeout=100) == -signal.SIGBUS)
    shutil.rmtree(whole)


def places(folder):
    """Links and names as places for a result: followed, or refused before anything is made."""
    disk, source = os.path.join(folder, "disk"), os.path.join(folder, "places-from")
    os.mkdir(disk)
    check("make tiny", run("make-checkpoint", "--preset", "tiny", "--out", source).returncode == 0)
    for name, arguments in (("a", ("make-checkpoint", "--preset", "tiny", "--out")),
                            ("b", ("convert", "--from", source, "--format", "compressed-tensors", "--to"))):
        link, real, dangling = (os.path.join(folder, name + end) for end in ("-link", "-real", "-dangling"))
        os.mkdir(real)
        os.symlink(real, link)
        r = run(*arguments, link)
        check(f"{name}: a link to an empty directory", r.returncode == 0 and os.path.islink(link)
              and os.path.exists(os.path.join(real, "config.json")), r)
        os.symlink(os.path.join(folder, "nowhere", "x"), dangling)
        before = sorted(os.listdir(folder))
        r = run(*arguments, dangling)
        check(f"{name}: a link to nothing", r.returncode == 2 and "is a link to" in r.stderr, r)
        r = run(*arguments, os.path.join(folder, "x" * 250))
        check(f"{name}: a long name", r.returncode == 3 and "i/o error" in r.stderr and "too long" in r.stderr, r)
        r = run(*arguments, "/dev/shm")
        if not os.path.ismount("/dev/shm") or os.listdir("/dev/shm"):
            print(f"{name}: /dev/shm is no empty mount point here")
        else:
            check(f"{name}: a mount point", r.returncode == 2 and "is a mount point" in r.stderr, r)
        check(f"{name}: nothing made", sorted(os.listdir(folder)) == before)
    target, link = os.path.join(disk, "j"), os.path.join(folder, "json-link")
    os.symlink(target, link)
    r = run("--json", link, "inspect", source)
    check("--json onto a link to nothing yet", r.returncode == 0 and os.path.islink(link) and os.path.exists(target), r)
    os.remove(link)
    os.symlink(os.path.join(folder, "nowhere", "j"), link)
    r = run("--json", link, "inspect", source)
    check("--json onto a link to nowhere", r.returncode == 2 and "there is no folder" in r.stderr
          and os.path.islink(link), r)


with tempfile.TemporaryDirectory() as root:
    places(root)
    cut_while_it_is_read(root)
    named_and_run(root)
    converted(root)
    at_once(root)
    killed(root)
finish()
