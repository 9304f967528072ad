#!/usr/bin/env python3
"""Counts, in machine code of sm_90, what the loops with products make of their fma.

    nvcc -cubin -gencode arch=compute_90a,code=sm_90a -O3 -std=c++20 -Isrc -Iinclude KERNELS.cu
    nvdisasm -c -hex KERNELS.cubin | lab/bench/kernels/count_fma.py [--widest]

For each innermost loop (from a label to a branch back to it) of each kernel: its instructions, fma
and fmul, how many of these yield to another warp, how many registers they read, and how many of
them read three. A register that the instruction before has read in the same place and marked for
reuse is not read again. What that costs: docs/performance-kernels.md, "What an fma reads".
"""

import argparse
import dataclasses
import re
import sys

KERNEL = re.compile(r"^\s*\.section\s+\.text\.([^,]+),")
LABEL = re.compile(r"^\s*(\.L_x_\w+):")
CODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
TARGET = re.compile(r"\bBRA\b.*`\((\.L_x_\w+)\)")
REGISTER = re.compile(r"-?\|?(R\d+)\b")
SLOTS = 4  # places of operands that can be marked


@dataclasses.dataclass
class Instruction:
    text: str  # without its predicate
    control: int = 0

    @property
    def name(self):
        return self.text.split()[0].split(".")[0]

    @property
    def yields(self):
        return self.control >> 45 & 1 == 0

    @property
    def reuse(self):
        return self.control >> 58 & 15

    def sources(self):
        """The register in each place of an operand, or None."""
        operands = self.text.split(None, 1)[1].split(",")[1:] if " " in self.text else []
        found = [REGISTER.match(operand.strip()) for operand in operands[:SLOTS]]
        return [m and m.group(1) for m in found] + [None] * (SLOTS - len(found))


def parse(lines):
    """Yields (kernel, instructions, labels) for each kernel; labels are positions."""
    name, code, labels = None, [], {}
    for line in lines:
        if m := KERNEL.match(line):
            if code:
                yield name, code, labels
            name, code, labels = m.group(1), [], {}
        elif m := LABEL.match(line):
            labels[m.group(1)] = len(code)
        elif m := CODE.match(line):
            code.append(Instruction(re.sub(r"^@!?U?P\w+\s+", "", m.group(1))))
        elif (m := CONTROL.match(line)) and code:
            code[-1].control = int(m.group(1), 16)
    if code:
        yield name, code, labels


def loops(code, labels):
    """The innermost ones with products: (first, last)."""
    found = []
    for last, instruction in enumerate(code):
        m = TARGET.search(instruction.text)
        first = labels.get(m.group(1), last + 1) if m else last + 1
        if any(x.name == "QGMMA" for x in code[first : last + 1]):
            found.append((first, last))
    inner = []
    for first, last in sorted(found, key=lambda loop: loop[1] - loop[0]):
        if all(last < other_first or other_last < first for other_first, other_last in inner):
            inner.append((first, last))
    return sorted(inner)


def count(body):
    adds = yields = reads = threes = 0
    kept = [None] * SLOTS
    for instruction in body:
        sources = instruction.sources()
        if instruction.name in ("FFMA", "FMUL"):
            read = sum(1 for at in range(SLOTS) if sources[at] and sources[at] != kept[at])
            adds += 1
            yields += instruction.yields
            reads += read
            threes += read == 3
        kept = [sources[at] if instruction.reuse >> at & 1 else None for at in range(SLOTS)]
    return adds, yields, reads, threes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="of nvdisasm -c -hex; else standard input")
    parser.add_argument("--widest", action="store_true", help="of a kernel only the loop with most")
    args = parser.parse_args()
    with open(args.file) if args.file else sys.stdin as lines:
        kernels = list(parse(lines))
    rows = []
    for name, code, labels in kernels:
        found = []
        for first, last in loops(code, labels):
            body = code[first : last + 1]
            product = next(x.text.split()[0] for x in body if x.name == "QGMMA").split(".")[1]
            found.append((product, len(body), *count(body)))
        if args.widest and found:
            found = [max(found, key=lambda row: row[2])]
        rows += [(name, row) for row in found]
    if not rows:
        sys.exit("count_fma: no loop with products (QGMMA); is this of nvdisasm -c -hex?")
    last_name = None
    for name, (product, size, adds, yields, reads, threes) in rows:
        if name != last_name:
            print(name)
        last_name = name
        print(
            f"  {product:9} {size:5} instructions, {adds:4} fma and fmul, {yields:4} yield, "
            f"{reads:4} registers read, {threes:4} read three"
        )


if __name__ == "__main__":
    main()
