#!/usr/bin/env python3
"""masked_features.py TEST_CPU_EXPERTS: no instruction runs that the machine does not have.

For each instruction set that kernels use beyond SSE2, a copy of the test program is made in which its
instructions, and those of all sets that need it, are illegal ones (ud2): what a machine without it would
make of them. The copy's tests must pass when the set is hidden from it. When it is not, the copy must end
by SIGILL where this machine has the set: so one of these instructions would be noticed.
Exit status 77: there is no objdump.
"""
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile

ORDER = ["amx", "bf16", "vnni", "avx512", "avx", "sse4"]
# What a machine lacks, and what is therefore hidden from the kernels.
MACHINES = [["amx"], ["amx", "bf16"], ["vnni"], ["amx", "bf16", "vnni"], ["amx", "bf16", "vnni", "avx512"],
            ["amx", "bf16", "vnni", "avx512", "avx"], ORDER]
FLAG = {"amx": "amx_bf16", "bf16": "amx_bf16",  # Nothing but tiles needs bf16.
        "vnni": "avx512_vnni", "avx512": "avx512bw", "avx": "avx2",
        "sse4": "sse4_2"}
TESTS = ("CpuExperts.*:CpuActivations.*:CpuNodes.TheStage*:CpuRepack.*:"
         "-CpuExperts.EveryInstructionSetThatThisMachineHas:CpuExperts.RowsThatLieInTheOutputGiveTheSameBits")
LEGACY = {0x66, 0xF2, 0xF3, 0xF0, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65}


def kind_of(code, mnemonic):
    """Of one instruction, by its bytes; None: every machine has it."""
    if re.match(r"(ldtilecfg|sttilecfg|tile|tdp)", mnemonic):
        return "amx"
    if re.match(r"(vdpbf16ps|vcvtne2?ps2bf16)", mnemonic):
        return "bf16"
    if re.match(r"vpdp(bu|w)s", mnemonic):
        return "vnni"
    at = 0
    while at < len(code) and code[at] in LEGACY:
        at += 1
    rest = code[at:]
    if rest[:1] == b"\x62" or re.match(r"k(mov|and|or|xor|xnor|not|shift|add|test|unpck|ortest)", mnemonic):
        return "avx512"
    if rest[:1] in (b"\xc4", b"\xc5"):
        return "avx"
    if rest and rest[0] & 0xF0 == 0x40:
        rest = rest[1:]
    return "sse4" if rest[:2] in (b"\x0f\x38", b"\x0f\x3a") else None


def instructions(program):
    """(address, kind) of all that not every machine has."""
    out = subprocess.run(["objdump", "-d", "--insn-width=16", "-j", ".text", program], capture_output=True, text=True,
                         check=True).stdout
    line = re.compile(r"^ *([0-9a-f]+):\t((?:[0-9a-f]{2} )+) *\t(\S+)")
    for match in map(line.match, out.splitlines()):
        if match is None:
            continue
        kind = kind_of(bytes.fromhex(match[2]), match[3])
        if kind is not None:
            yield int(match[1], 16), kind


def offset_of(image):
    """From addresses to places in the file (ELF, 64 bits)."""
    first, size, count = struct.unpack_from("<Q", image, 32)[0], *struct.unpack_from("<HH", image, 54)
    loads = []
    for i in range(count):
        kind, _, offset, address, _, file_size = struct.unpack_from("<IIQQQQ", image, first + i * size)
        if kind == 1:
            loads.append((address, offset, file_size))

    def find(address):
        return next(offset + address - start for start, offset, size in loads if start <= address < start + size)
    return find


def machine_flags():
    with open("/proc/cpuinfo") as file:
        return set(next(line for line in file if line.startswith("flags")).split())


def main():
    program = sys.argv[1]
    if shutil.which("objdump") is None:
        print("no objdump on this machine")
        return 77
    with open(program, "rb") as file:
        image = file.read()
    found, flags, failures = list(instructions(program)), machine_flags(), 0
    for kind in ORDER:
        count = sum(1 for _, k in found if k == kind)
        print(f"{count:6} instructions of {kind}")
        failures += count == 0
    find = offset_of(image)
    for missing in MACHINES:
        broken = bytearray(image)
        for address, kind in found:
            if kind in missing:
                place = find(address)
                broken[place:place + 2] = b"\x0f\x0b"  # ud2
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "program")
            with open(path, "wb") as file:
                file.write(broken)
            os.chmod(path, 0o755)
            for hidden in (missing, []):
                if not hidden and not any(FLAG[m] in flags for m in missing):
                    continue  # Nothing of it would run anyway.
                result = subprocess.run([path, "--gtest_brief=1", f"--gtest_filter={TESTS}"], capture_output=True,
                                        text=True, env={**os.environ, "SLUICE_TEST_HIDE": " ".join(hidden)})
                want = 0 if hidden else -signal.SIGILL
                kernels = re.search("kernels: (.*)", result.stdout)
                print(f"without {', '.join(missing)}; hidden: {'yes' if hidden else 'no'}: status {result.returncode}"
                      f", kernels of {kernels[1] if kernels else '?'}")
                if result.returncode != want:
                    failures += 1
                    print(f"FAILED: expected {want}\n{result.stdout[-3000:]}{result.stderr[-1000:]}")
    return 1 if failures else 0


sys.exit(main())
