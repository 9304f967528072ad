#!/usr/bin/env python3
"""What `sluice` says when it refuses, and where it says it. usage: test_refusals_cli.py SLUICE"""
import json
import os
import signal
import subprocess
import tempfile
import time

from program import SLUICE, check, finish, run

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
    # A file that is there is replaced, never written into: who has it open keeps the old content.
    results = os.path.join(folder, "results")
    os.mkdir(results)
    for option in ("--json", "--metrics", "--expert-rows"):
        path, link = os.path.join(results, "file"), os.path.join(results, "link")
        with open(path, "w") as file:
            file.write("old")
        os.symlink("file", link)
        with open(path) as before:
            r = run("run", "--checkpoint", model, "--tokens", "1", option, link)
            check(f"{option} is whole", r.returncode == 0 and before.read() == "old" and os.path.islink(link)
                  and os.path.getsize(path) > 100 and sorted(os.listdir(results)) == ["file", "link"], r)
        os.remove(link)
    r = run("run", "--checkpoint", model, "--tokens", "1", "--json", "/dev/full")
    check("--json on a full device", r.returncode != 0 and "/dev/full: cannot write: No space left" in r.stderr, r)
    # What cannot be printed is no success, and no file of the command takes the place of what is closed.
    json_path = os.path.join(folder, "report.json")
    for arguments in (("--help",), ("run", "--help"), ("inspect", model), ("accuracy", "--checkpoint", model),
                      ("plan", "--checkpoint", model, "--ranks", "2", "--tokens", "4"),
                      ("run", "--checkpoint", model, "--tokens", "4", "--ranks", "2"),
                      ("run", "--checkpoint", model, "--tokens", "4", "--ranks", "2", "--transport", "ipc")):
        for lost, reason in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
            saved = () if "--help" in arguments else ("--json", json_path)
            r = subprocess.run(["sh", "-c", f'"$0" "$@" {lost}', SLUICE, *arguments, *saved], capture_output=True,
                               text=True, timeout=300)
            check(f"{arguments} {lost}", r.returncode == 3 and r.stderr.count("\n") == 1
                  and "sluice: i/o error: standard output: cannot write" in r.stderr
                  and reason in r.stderr, r)
            if saved and arguments[0] != "accuracy":  # That prints so much that it fails before its end.
                with open(json_path) as file:
                    check(f"{arguments} {lost}: JSON", json.load(file)["command"] == arguments[0], r)
                os.remove(json_path)
    r = subprocess.run(["sh", "-c", f'"$0" inspect "$1" >/dev/full 2>/dev/full', SLUICE, model])
    check("nothing can be said", r.returncode == 3, r)
    # A name that is no UTF-8 is in JSON with U+FFFD.
    raw = os.fsencode(folder) + b"/n\xff"
    os.symlink(model, raw)
    with open(json_path, "w") as file:
        file.write("{}")
    for arguments in ((b"inspect", raw), (b"run", b"--checkpoint", raw, b"--tokens", b"4", b"--ranks", b"2"),
                      (b"accuracy", b"--checkpoint", raw)):
        r = subprocess.run([os.fsencode(SLUICE), *arguments, b"--json", os.fsencode(json_path)],
                           capture_output=True, timeout=300)
        with open(json_path, encoding="utf-8") as file:
            text = file.read()
        check(f"{arguments}", r.returncode == 0 and "/n\ufffd" in text and json.loads(text)["command"], r)
    r = run("bench", "experts", "--rest", "nan")
    check("bench refuses a rest that is no number", r.returncode == 2
          and r.stderr.startswith("--rest: 'nan' is not a number in [0, 10000]\n"), r)
    # Numbers are what they seem to be, and sizes are sizes.
    for arguments, why in (
            (("run", "--checkpoint", model, "--tokens", "010"), "--tokens: '010' is not a whole number in decimal"),
            (("run", "--checkpoint", model, "--tokens", "0x10"), "--tokens: '0x10' is not a whole number in decimal"),
            (("run", "--checkpoint", model, "--ranks", "+2"), "--ranks: '+2' is not a whole number in decimal"),
            (("run", "--checkpoint", model, "--seed", "18446744073709551616"), "--seed: '1844674407370955161"),
            (("run", "--checkpoint", model, "--seed", "-1"), "--seed: -1 is below 0"),
            (("run", "--checkpoint", model, "--routed-scaling-factor", "1e-46"), "'1e-46' is not a positive float32"),
            (("run", "--checkpoint", model, "--routed-scaling-factor", "0x10"), "'0x10' is not a number in decimal"),
            (("bench", "experts", "--rest", "0x10"), "--rest: '0x10' is not a number in decimal, such as 1.5"),
            (("plan", "--preset", "tiny", "--memory", "0x10GB"), "--memory '0x10GB' is not a size"),
            (("accuracy", "--preset", "tiny", "--budget", "0x2%"), "--budget '0x2%' is not a percentage"),
            (("accuracy", "--preset", "tiny", "--gate", "static"), "--gate static: it is what a budget judges"),
            (("accuracy", "--preset", "tiny", "--budget", "2%", "--gate", "static", "--recipe", "direct,direct-token"),
             "--gate static: it is none of --recipe direct,direct-token"),
            (("accuracy", "--preset", "tiny", "--budget", "2%", "--recipe", "direct-token"),
             "--gate direct: it is none of --recipe direct-token"),
            (("run", "--checkpoint", model, "--routed-scaling-factor", "0"), "'0' is not a positive float32"),
            (("run", "--checkpoint", model, "--layers", "0-2000000000"), "0 to 2000000000 ends behind layer 3"),
            (("run", "--checkpoint", model, "--ranks", "3"), "divisible by 3 ranks; give --slots, at least 9"),
            (("make-checkpoint", "--preset", "tiny", "--out", model + "0", "--hidden", "0"), "--hidden: '0'"),
            (("make-checkpoint", "--preset", "tiny", "--out", model + "0", "--experts", "0"), "--experts: '0'"),
            (("make-checkpoint", "--preset", "tiny", "--out", ""), "--out: is empty"),
            (("convert", "--from", model, "--to", "", "--format", "w4afp8"), "--to: is empty"),
            (("convert", "--from", model, "--to", model + "0", "--format", "w4afp8", "--experts", "0:99"),
             "experts [0, 99) are not all in [0, 8)"),
            (("inspect", model, "--max-layers", "-1"), "--max-layers: '-1' is not a whole"),
            (("inspect", model, "--max-experts", "-3"), "--max-experts: '-3' is not a whole"),
            (("bench", "experts", "--hidden", "0"), "--hidden: '0' is not a whole"),
            (("bench", "experts", "--hidden", "-128"), "--hidden: '-128' is not a whole"),
            (("bench", "experts", "--preset", "tiny", "--hidden", "2147483520"), "--hidden: '2147483520' is not"),
            (("bench", "layer", "--hidden", "0"), "--hidden: '0' is not a whole"),
            (("bench", "exchange", "--hidden", "1073741824"), "--hidden: '1073741824' is not a whole"),
            (("plan", "--preset", "tiny", "--hosts", "2"), "16 ranks, 8 for each of --hosts 2, do not divide 8"),
            (("plan", "--preset", "tiny", "--ranks", "3"), "8 experts are not divisible by 3 ranks; give --slots, at"),
            (("frob",), "'frob' is no command"), (("bench", "frob"), "'frob' is no command"),
            (("bench", "exchange", "--hosts", "3"), "exchange does not take: --hosts 3"),
            (("convert", "--frob", "x"), "convert does not take: --frob x"),
            (("inspect", model, "b", "c"), "inspect does not take: b c"),
            (("plan", "--preset", "tiny", "--memory", "nan"), "--memory 'nan' is not a size"),
            (("plan", "--preset", "tiny", "--memory", "inf"), "--memory 'inf' is not a size"),
            (("balance", "--counts", os.path.join(model, "config.json"), "--ranks", "2", "--slots", "8"),
             "is no file of format 'sluice-expert-rows'"),
            (("accuracy", "--checkpoint", model, "--replay", os.path.join(model, "config.json")),
             "is no safetensors file, but JSON text")):
        r = run(*arguments)
        check(f"{arguments[0]} refuses {arguments[-2:]}", r.returncode == 2 and why in r.stderr and not r.stdout
              and "corrupt" not in r.stderr, r)
    r = run("plan", "--preset", "r1-layer", "--hosts", "2", "--machine", "/dev/zero")
    check("a machine is in a regular file", r.returncode == 3 and "/dev/zero: not a regular file" in r.stderr, r)
    # A process that a signal ends is named by whoever started it, also if nobody is left to say so.
    for ranks in (1, 2):
        job = subprocess.Popen([SLUICE, "run", "--checkpoint", model, "--transport", "ipc", "--ranks", str(ranks),
                                "--repeat", "100000", "--tokens", "1"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
        started = f"/proc/{job.pid}/task/{job.pid}/children"
        while job.poll() is None and len(processes := open(started).read().split()) < ranks:
            time.sleep(0.01)
        os.kill(int(processes[-1]), signal.SIGKILL)
        said = job.communicate(timeout=60)[1]
        check(f"killed, of {ranks}", job.returncode == 4
              and f"error: rank {ranks - 1}: signal 9 (Killed) ended its process" in said)
    # Sizes that no machine has room for are named, with what there is.
    for arguments, why in (
            (("exchange", "--ranks", "64", "--tokens", "1048576", "--repeat", "1", "--pairs", "1"),
             "exchanges of --ranks 64 with --tokens 1048576 of --hidden 7168 take "),
            (("experts", "--hidden", "1048576", "--intermediate", "1048576"),
             "the weights of 32 experts of --hidden 1048576 and --intermediate 1048576 take "),
            (("layer", "--hidden", "1048576", "--intermediate", "1048576"),
             "the weights of --experts 256 of --hidden 1048576 and --intermediate 1048576 take ")):
        r = run("bench", *arguments)
        check(f"bench {arguments[0]} names sizes", r.returncode == 5 and why in r.stderr
              and r.stderr.startswith("sluice: out of memory: ") and "this machine has" in r.stderr, r)
    # A FIFO has no end to wait for.
    pipe = os.path.join(folder, "pipe")
    os.makedirs(pipe)
    os.mkfifo(os.path.join(pipe, "config.json"))
    r = run("inspect", pipe)
    check("inspect refuses a FIFO", r.returncode == 3 and "not a regular file" in r.stderr, r)
    # Placements of another model, and files of another kind.
    rows, placement, other = (os.path.join(folder, name) for name in ("rows.json", "placement.json", "other"))
    for arguments in (("run", "--checkpoint", model, "--ranks", "2", "--tokens", "4", "--expert-rows", rows),
                      ("balance", "--counts", rows, "--ranks", "2", "--slots", "10", "--out", placement),
                      ("make-checkpoint", "--preset", "tiny", "--experts", "6", "--out", other)):
        r = run(*arguments)
        check(f"{arguments[0]} for placements", r.returncode == 0, r)
    r = run("run", "--checkpoint", other, "--ranks", "2", "--tokens", "4", "--placement", placement)
    check("run refuses a placement of another model", r.returncode == 2
          and f"--placement {placement} is for 8 experts; the checkpoint has 6" in r.stderr, r)
    r = run("run", "--checkpoint", model, "--ranks", "2", "--tokens", "4", "--placement", rows)
    check("run refuses rows as a placement", r.returncode == 2 and "expected 'sluice-placement'" in r.stderr
          and "corrupt" not in r.stderr, r)
    # What was printed before a refusal stands before it, where both go to one file.
    kimi = os.path.join(folder, "kimi-int4")
    r = run("make-checkpoint", "--preset", "tiny", "--format", "kimi-int4", "--out", kimi)
    check("make kimi-int4", r.returncode == 0, r)
    static = [SLUICE, "run", "--checkpoint", kimi, "--recipe", "static", "--tokens", "4"]
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
          and "none are given for model.layers.3.mlp.experts; " in r.stderr, r)
    r = run("run", "--checkpoint", kimi, "--tokens", "4")
    check("without static scales the file is not missed", r.returncode == 0 and r.stderr == "", r)
finish()
