#!/usr/bin/env python3
"""What `sluice` says when it refuses, and where it says it. usage: test_refusals_cli.py SLUICE"""
import os
import subprocess
import sys
import tempfile

sluice = sys.argv[1]
failures = []


def run(*arguments):
    return subprocess.run([sluice, *arguments], capture_output=True, text=True, timeout=300)


def check(name, ok, result):
    if not ok:
        failures.append(name)
        print(f"FAILED {name}: exit {result.returncode}\n{result.stdout}{result.stderr or ''}")


with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "w4afp8")
    r = run("make-checkpoint", "--preset", "tiny", "--out", model)
    check("make w4afp8", r.returncode == 0, r)
    for option, allowed, values in (("--layer", "[0, 2147483647]", ("-1", "abc", "2.5", "1e3", "99999999999", "")),
                                    ("--ranks", "[1, 1024]", ("0", "1025", "abc", "2.5", "1e3", "99999999999", ""))):
        for value in values:
            r = run("run", "--checkpoint", model, option, value)
            check(f"run refuses {option} '{value}' in one short line", r.returncode == 2 and len(r.stderr) < 200
                  and r.stderr.startswith(f"{option}: '{value}' is not a whole number in {allowed}\n"), r)
    r = run("bench", "experts", "--rest", "nan")
    check("bench refuses a rest that is no number", r.returncode == 2
          and r.stderr.startswith("--rest: 'nan' is not a number in [0, 10000]\n"), r)
    # What was printed before a refusal stands before it, where both go to one file.
    kimi = os.path.join(folder, "kimi-int4")
    r = run("make-checkpoint", "--preset", "tiny", "--format", "kimi-int4", "--out", kimi)
    check("make kimi-int4", r.returncode == 0, r)
    static = [sluice, "run", "--checkpoint", kimi, "--recipe", "static", "--tokens", "4"]
    for transport in ("inproc", "ipc"):
        r = subprocess.run([*static, "--ranks", "2", "--transport", transport], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, timeout=300)
        check(f"a refusal over {transport} comes after what was printed", r.returncode == 2
              and 0 == r.stdout.find("layer ") < r.stdout.find("sluice: unsupported: ")
              and r.stdout.count("layer   ") == 1 and "act_scales" not in r.stdout, r)
    # A file that cannot be read is named where its scales are missed, and only there.
    scales = os.path.join(kimi, "act_scales.safetensors")
    why = "act_scales.safetensors cannot be read (0 bytes; a safetensors file has at least 8) and is left out"
    open(scales, "wb").close()
    r = run(*static[1:])
    check("a refusal for want of scales names the file", r.returncode == 2 and why in r.stderr
          and "has no model.layers.3.mlp.experts.*.input_scale" in r.stderr, r)
    r = run("run", "--checkpoint", kimi, "--tokens", "4")
    check("without static scales the file is not missed", r.returncode == 0 and r.stderr == "", r)
print(f"{len(failures)} failures")
sys.exit(1 if failures else 0)
