#!/usr/bin/env python3
"""What each part of the W4A8 main loops costs: builds with one part left out, timed in one run.

Widening cannot be left out this way: ptxas then runs the products one after the other (C7513), and
ptxas_guard.sh refuses the object, as it refuses one that spills.

    cmake --build build/cuda --target bench_w4a8
    lab/bench/kernels/leave_out.py build/cuda [--out DIR] [--no-run] [bench_w4a8's options]

Each variant is a copy of src/backend/cuda/sm90_w4a8 with a few lines replaced. The script fails
when a line is not there exactly once, so a changed main loop cannot be measured by mistake. It
compiles the kernels of bf16 scales in groups of 128 (with --group 32 those of 32) with the commands
of BUILD (a Ninja build), in parallel, links them before the library that holds the real ones, and
runs the programs in turn. RESULTS OF ALL VARIANTS BUT THE FIRST ARE WRONG ON PURPOSE; the source
tree and BUILD stay as they are.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
HEADERS = "backend/cuda/sm90_w4a8"
KERNELS = (
    "sm90_w4a8_decode_bf16_g{}.cu",
    "sm90_w4a8_prefill_bf16_g{}.cu",
    "sm90_w4a8_prefill64_bf16_g{}.cu",
)
UNIT, LOOP, PROMOTE = "unit.cuh", "mainloop.cuh", "promote.cuh"
UNITS32, MATH = "group32_units.cuh", "math_role.cuh"

NO_TOKEN_SCALES = [
    (PROMOTE, f"__fmul_rn(ws.{row}, xs[{column}])", f"ws.{row}")
    for row in "xy"
    for column in ("i", "i + 1")
]
NO_PROMOTION = [
    (
        PROMOTE,
        "    const int at = 2 * (first + i);\n",
        "    const int at = 2 * (first + i);\n    if (at > 2) continue;\n",
    )
]
ONE_PRODUCT = [
    (
        UNIT,
        "for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32",
        "for (int i = 0; i < 1; ++i) ptx::wgmma_m64k32",
    )
]
# Row tiles that run through one loop (8 and 16 columns) keep their ends.
NO_ARITHMETIC = [
    (LOOP, "  if (!has_slabs) {\n", "  if (has_slabs || !has_slabs) {\n"),
    (
        MATH,
        "    if (busy_tiles > 0) {\n",
        "    for (int i = 0; i < busy_tiles; ++i) {\n"
        "      for (int k = 0; k < phase.num_steps; ++k) release(s, acquire(s, ring));\n"
        "      finish_tile<C, X, N>(s, phase, t, row_tile++, 0, ring, true, sum);\n"
        "    }\n"
        "    if (busy_tiles < 0) {\n",
    ),
]

# Not joined, so never read: ptxas drops the products of these units, too.
FEW_UNITS = [
    (
        UNITS32,
        "                                     float (&joined)[R]) {\n#pragma unroll\n",
        "                                     float (&joined)[R]) {\n"
        "  if (i == 1 || i == 2) return;\n#pragma unroll\n",
    )
]
ONE_STEP = [
    (
        UNIT,
        "  ptx::wgmma_m64k32(acc, f.a[i], x +",
        "  if (i == 0) ptx::wgmma_m64k32(acc, f.a[i], x +",
    )
]

VARIANTS = {
    "nothing left out": [],
    "one fma (no token scales)": NO_TOKEN_SCALES,
    "promotion of all but two columns": NO_PROMOTION,
    "three of four products": ONE_PRODUCT,
    "all arithmetic along K": NO_ARITHMETIC,
}
VARIANTS32 = {
    "nothing left out": [],
    "two of four units, products and joining": FEW_UNITS,
    "three of four products": ONE_STEP,
    "all arithmetic along K": NO_ARITHMETIC,
}


def make_sources(edits, folder):
    """Copies the kernels' folder to `folder`/src and makes the edits there."""
    target = folder / "src" / HEADERS
    shutil.copytree(ROOT / "src" / HEADERS, target)
    for file, old, new in edits:
        text = (target / file).read_text()
        if text.count(old) != 1:
            sys.exit(f"leave_out.py: {file} has {text.count(old)} times, not once: {old.strip()}")
        (target / file).write_text(text.replace(old, new))


def ninja_commands(build):
    """The commands that make bench_w4a8, one a line."""
    lines = subprocess.run(
        ["ninja", "-C", build, "-t", "commands", "bench_w4a8"],
        check=True,
        capture_output=True,
        text=True,
    )
    return lines.stdout.splitlines()[0 if "Entering" not in lines.stdout[:60] else 1 :]


def compile_kernel(commands, build, kernel, folder):
    """Compiles a kernel with the build's command and `folder`'s headers; returns the object."""
    (command,) = [c for c in commands if f"/{kernel} -o " in c]
    made = command.split(" -o ")[1].split()[0]
    command = command.replace(made, f"{folder}/{kernel}.o")
    command = command.replace(" -I", f" -I{folder}/src -I", 1)
    subprocess.run(command, shell=True, cwd=build, check=True)
    return f"{folder}/{kernel}.o"


def link(commands, build, objects, folder):
    """Links bench_w4a8 with `objects` before everything else; returns the program."""
    command = commands[-1]
    made = command.split(" -o ")[1].split()[0]
    program = f"{folder}/bench_w4a8"
    command = command.replace(f" -o {made}", f" {' '.join(objects)} -o {program}", 1)
    subprocess.run(command, shell=True, cwd=build, check=True)
    return program


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("build", type=pathlib.Path, help="a Ninja build of this tree")
    parser.add_argument("--out", type=pathlib.Path, help="made anew (BUILD/leave_out)")
    parser.add_argument("--no-run", action="store_true", help="build OUT/0/bench_w4a8 and so on")
    args, options = parser.parse_known_args()
    build = args.build.resolve()
    out = (args.out or build / "leave_out").resolve()
    shutil.rmtree(out, ignore_errors=True)
    if "--rows" not in options:
        options += ["--rows", "64,128,1024"]
    group = options[options.index("--group") + 1] if "--group" in options else "128"
    variants = VARIANTS32 if group == "32" else VARIANTS
    commands = ninja_commands(build)
    folders = {name: out / str(i) for i, name in enumerate(variants)}
    for name, folder in folders.items():
        make_sources(variants[name], folder)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            name: [
                pool.submit(compile_kernel, commands, build, k.format(group), folder)
                for k in KERNELS
            ]
            for name, folder in folders.items()
        }
        failed = [n for n, list_ in jobs.items() if any(job.exception() for job in list_)]
    for name, folder in folders.items():
        print(f"\n== left out: {name}", flush=True)
        if name in failed:
            print("does not compile: see above")
            continue
        program = link(commands, build, [job.result() for job in jobs[name]], folder)
        if args.no_run:
            print(program)
            continue
        subprocess.run([program, *options], check=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
