#!/usr/bin/env python3
"""Checks the shape of the source tree: who includes whom, and a few house rules.

    tools/check_includes.py [ROOT]

Prints one line per violation, `file:line: rule: text`, and exits with 1 if there is any.
docs/architecture.md explains the layering.
"""
import re
import sys
from collections import defaultdict
from pathlib import Path

from standard_headers import Includes

# --- The layering, as data ------------------------------------------------------------------------
# A path belongs to the first module whose prefix it starts with. `may` names the modules it may
# include besides itself; `outside` the third-party headers (by prefix). Every module may include
# the C++ standard library, and every module but `public` the formatting library.
MODULES = [
    # name             path prefix             may include                                outside
    ("public",         "include/sluice/",      (),                                        ()),
    ("host and device", "src/core/host_device.h", (),                                     ()),
    ("core",           "src/core/",            ("public",),                               ("posix",)),
    ("quant",          "src/quant/",           ("public", "core"),                        ()),
    # Reads JSON that may be hostile.
    ("json",           "src/checkpoint/json_reader", ("public", "core"),                  ()),
    ("checkpoint",     "src/checkpoint/",      ("public", "core", "quant", "json"),       ("posix",)),
    ("device handles", "src/transport/device.cuh", ("public", "core", "ptx"),             ("cuda",)),
    ("device memory",  "src/transport/ipc_device", ("public", "core"),                    ("cuda",)),
    ("nccl library",   "src/transport/nccl_library", ("public", "core", "nccl table"),    ("posix", "cuda")),
    ("nccl table",     "src/transport/nccl_api.h", (),                                     ()),
    # What crosses hosts, for the exchange that spreads it inside them.
    ("rails",          "src/transport/rails.h", ("public",),                              ()),
    ("transport",      "src/transport/",       ("public", "core", "device handles", "device memory", "nccl table", "rails"), ("posix",)),
    # What rows are: values that kernels take as arguments.
    ("rows",           "src/backend/rows.h",   ("public", "host and device"),             ()),
    # What is known of a backend before there is one; each backend's folder defines its own.
    ("traits",         "src/backend/traits.h", ("public",),                               ()),
    ("experts check",  "src/backend/check_experts", ("public", "core"),                   ()),
    ("scale fault",    "src/backend/scale_fault.h", ("quant", "host and device"),         ()),
    # How work comes again, and whose turn it is.
    ("queued work",    "src/backend/queued_work.h", ("public",),                          ()),
    ("ops",            "src/backend/ops.h",    ("public", "core", "quant", "rows", "queued work"), ()),
    ("repack checks",  "src/backend/repack_checks", ("public", "core", "traits", "ops", "scale fault"), ()),
    ("cpu backend",    "src/backend/cpu/",     ("public", "core", "quant", "rows", "traits", "ops", "experts check", "repack checks"), ("posix", "hwy/", "simd")),
    ("ptx",            "src/backend/cuda/ptx/", ("public", "core"),                       ("cuda",)),
    # What every CUDA file needs: error macro, split of an SM's memory, formats as device functions.
    ("cuda support",   "src/backend/cuda/check.h",    ("public",),                        ("cuda",)),
    ("cuda carveout",  "src/backend/cuda/carveout.h", ("public", "cuda support"),         ("cuda",)),
    ("cuda formats",   "src/backend/cuda/e4m3_group.cuh", ("public", "ptx"),             ("cuda",)),
    ("cuda backend",   "src/backend/cuda/",    ("public", "core", "quant", "rows", "queued work", "traits", "ops", "ptx", "experts check", "repack checks",
                                                "scale fault", "device handles", "cuda support", "cuda carveout",
                                                "cuda formats"),
                                                                                          ("cuda", "cute/", "cutlass/")),
    # The factory: the one place that names concrete backends.
    ("backend",        "src/backend/",         ("public", "core", "traits", "ops", "cpu backend", "cuda backend"), ("cuda",)),
    # Which rank has a slot: a value for host code and kernels.
    ("slot ranks",     "src/exchange/slot_ranks.h", ("host and device",),                 ()),
    # The order of a sum and what it refuses: the model of the network refuses the same.
    ("sum parts",      "src/exchange/sum_parts.h", ("public",),                            ()),
    ("cuda exchange",  "src/exchange/cuda/",   ("public", "core", "host and device", "quant", "ops", "ptx", "device handles", "rails", "slot ranks", "sum parts", "exchange",
                                                "cuda support", "cuda carveout", "cuda formats"),
                                                                                          ("cuda",)),
    ("exchange",       "src/exchange/",        ("public", "core", "quant", "traits", "rows", "ops", "slot ranks", "sum parts"), ()),
    # Which experts to repeat and where to put them, from counts.
    ("balance",        "src/balance/",         ("public", "core", "json"),                ()),
    ("engine",         "src/engine/",          ("public", "core", "quant", "checkpoint", "traits", "ops", "slot ranks", "experts check", "exchange"), ()),
    # The laboratory stands on the runtime; no folder of src/ may include it.
    ("ranks",          "lab/ranks/",           ("public",),                               ("posix",)),
    ("files",          "lab/files/",           ("public", "core"),                        ("posix",)),
    ("synthetic",      "lab/synthetic/",       ("public", "core", "quant", "checkpoint", "files"), ("posix", "nlohmann/")),
    ("reference",      "lab/reference/",       ("public", "core", "quant"),               ()),
    ("convert",        "lab/convert/",         ("public", "core", "quant", "checkpoint", "json", "files"), ("nlohmann/",)),
    ("accuracy",       "lab/accuracy/",        ("public", "core", "quant", "checkpoint", "traits", "reference"), ()),
    ("report",         "lab/report/",          ("public",),                               ("nlohmann/",)),
    ("network",        "lab/network/",         ("public", "core", "sum parts"),           ("nlohmann/",)),
    # Kernel benchmarks time what lies under the public surface.
    ("kernel bench",   "lab/bench/kernels/",   ("public", "core", "cuda backend", "cuda exchange", "cuda support", "cuda formats", "ptx"), ("posix", "cuda")),
    # Other libraries' products, by themselves.
    ("peers",          "lab/bench/peers/",     (),                                        ("ggml",)),
    ("bench",          "lab/bench/",           ("public", "core", "quant", "checkpoint", "ops", "slot ranks"), ("posix",)),
    ("cli",            "cli/",                 ("public", "report"),                      ("posix", "CLI/", "nlohmann/")),
    ("python",         "python/",              ("public",),                               ("nanobind/",)),
]
# Tests may include anything but the engine's own files, which nothing may.
CLOSED = {"engine"}
# A type is found by its name: the runtime defines each one once, in whatever namespace, and so do all
# headers of the runtime, the laboratory and the command line together.
TYPE_FOLDERS = ("include/", "src/")
TYPE_HEADER_FOLDERS = ("include/", "src/", "lab/", "cli/")
HEADER_SUFFIXES = (".h", ".cuh", ".hpp")
TYPE = re.compile(r"(?:template\s*<.*>\s*)?(?:struct|class|union|enum(?:\s+class|\s+struct)?)\s+"
                  r"(?:alignas\([^)]*\)\s*|\[\[[^\]]*\]\]\s*)*(\w+)\s*(?:final\s*)?(?::(?!:)|\{)")
# Third-party headers that belong to exactly one file.
ONLY_IN = {
    "mpi.h": ("src/transport/mpi_start.h", "src/transport/mpi_link.cc"),
    "nccl.h": ("src/transport/nccl_library.cc", "lab/bench/kernels/bench_nccl.cu"),
}
# Public headers, in layers of their own. A folder of src/ may use those that it implements and those
# below them; it never sees a layer above, nor anything of the laboratory.
BASE = {"tensor.h", "error.h", "config.h", "stream.h"}
VALUES = BASE | {"quant.h", "recipe.h", "activation.h", "weight_format.h"}
BACKEND = VALUES | {"checkpoint.h", "backend.h", "matrix_source.h", "repack.h"}
PUBLIC_OF = {
    "core": BASE | {"interrupt.h"},
    "quant": VALUES,
    "checkpoint": VALUES | {"checkpoint.h"},
    "device handles": BASE | {"transport.h"},
    "device memory": BASE | {"transport.h"},
    "nccl library": BASE, "nccl table": BASE,
    "transport": BASE | {"transport.h", "network.h"},
    "rows": BACKEND, "queued work": BASE, "traits": BACKEND, "scale fault": BASE, "repack checks": BACKEND, "experts check": BACKEND, "ops": BACKEND, "cpu backend": BACKEND, "ptx": BASE,
    "cuda support": BASE, "cuda carveout": BASE, "cuda formats": VALUES, "cuda backend": BACKEND, "backend": BACKEND,
    "cuda exchange": BACKEND | {"transport.h", "exchange.h", "network_bytes.h", "placement.h"},
    "exchange": BACKEND | {"transport.h", "exchange.h", "hosts.h", "network_bytes.h", "placement.h"},
    "sum parts": {"exchange.h"},
    "json": BASE,
    "balance": BASE | {"placement.h", "balance.h", "placement_files.h"},
}

OUTSIDE = {
    "posix": re.compile(r"(sys/\w+|unistd|fcntl|sched|pthread|dirent|poll|signal|errno|netdb|netinet/\w+|net/if|ifaddrs|dlfcn|linux/\w+)\.h$"),
    "cuda": re.compile(r"(cuda|cuda_\w+|cooperative_groups|driver_types|vector_types|nvtx3/.*)(\.h|\.hpp)?$"),
    "simd": re.compile(r"(immintrin|cpuid|x86intrin|arm_neon)\.h$"),
}
STANDARD = re.compile(r"[a-z_0-9]+$")

SOURCE_SUFFIXES = {".h", ".cc", ".cuh", ".cu", ".hpp", ".cpp"}
TEXT_SUFFIXES = SOURCE_SUFFIXES | {".py", ".sh", ".md", ".txt", ".cmake", ".json", ".yaml"}
SOURCE_FOLDERS = ("include", "src", "lab", "cli", "python", "tests")
TEXT_FOLDERS = SOURCE_FOLDERS + ("docs", "tools", "scripts", "cmake")
# Compiled with precompiled headers, which hide what a file forgets to include.
PRECOMPILED = ("src/", "lab/", "cli/")
SOURCE_LINES, HEADER_LINES = 400, 250

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
ENVIRONMENT = re.compile(r"\b(secure_)?getenv\s*\(")
# No CI builds a wheel with CUDA, which would be refused for it: see core/random_bytes.h.
RANDOM = re.compile(r"\bstd::random_device\b")
# The library throws; it neither prints nor ends the process.
LOUD = re.compile(
    r"(std::c(out|err|log)\b|(?<![\w:.>])(std::)?(printf|puts|abort|exit|_Exit|quick_exit|terminate)"
    r"\s*\(|(?<!\w)(std::)?fprintf\s*\(|fmt::print\s*\()")


def module_of(path):
    for name, prefix, _, _ in MODULES:
        if path.startswith(prefix):
            return name
    return "tests" if path.startswith("tests/") else None


# Everything but the laboratory and what stands on it.
RUNTIME = {name for name, prefix, _, _ in MODULES if prefix.startswith("src/")} | {"public"}
RULES = {name: (may, outside) for name, _, may, outside in MODULES}


class Scan:
    def __init__(self, root):
        self.root = Path(root)
        self.violations = []
        self.types, self.types_of_headers = {}, {}  # name -> where it is defined

    def report(self, path, line, rule, text):
        self.violations.append(f"{path}:{line}: {rule}: {text}")

    def report_once(self, path, line, rule, text):
        if f"{path}:{line}: {rule}: {text}" not in self.violations:
            self.report(path, line, rule, text)

    def files(self, folders, suffixes):
        for folder in folders:
            for path in sorted((self.root / folder).rglob("*")):
                if path.suffix in suffixes and path.is_file() and "__pycache__" not in path.parts:
                    yield path.relative_to(self.root).as_posix(), path

    def resolve(self, includer, name):
        """The file of this repository that `name` means, or None."""
        for base in ("include", "src", "lab", str(Path(includer).parent), "."):
            candidate = self.root / base / name
            if candidate.is_file():
                return candidate.resolve().relative_to(self.root.resolve()).as_posix()
        return None

    @staticmethod
    def may_use_public(module, header):
        if module in PUBLIC_OF:
            return header in PUBLIC_OF[module]
        return module not in RUNTIME or not header.startswith("lab/")

    def check_include(self, path, line, name):
        module = module_of(path)
        target = self.resolve(path, name)
        if target is None:
            self.check_outside(path, line, module, name)
            return
        other = module_of(target)
        if other in CLOSED and module != other:
            self.report(path, line, "layering", f"nothing may include {other}: {name}")
        elif module == "tests" or other is None:
            return
        elif module == other:
            # A header of the runtime's may not show one of the laboratory's.
            if module == "public" and "/lab/" in target and "/lab/" not in path:
                self.report(path, line, "layering", f"the runtime may not include {name}")
        elif other not in RULES[module][0]:
            self.report(path, line, "layering", f"{module} may not include {other}: {name}")
        elif other == "public" and not self.may_use_public(module, target.removeprefix("include/sluice/")):
            self.report(path, line, "layering", f"{module} may not include the public header {name}")

    def check_outside(self, path, line, module, name):
        for prefix, owners in ONLY_IN.items():
            if name.startswith(prefix):
                if path not in owners and module != "tests":
                    self.report(path, line, "outside", f"{name} belongs in {' or '.join(owners)}")
                return
        if STANDARD.match(name) or module == "tests":
            return
        allowed = RULES[module][1] + (() if module == "public" else ("fmt/",))
        for entry in allowed:
            pattern = OUTSIDE.get(entry)
            if pattern.match(name) if pattern else name.startswith(entry):
                return
        self.report(path, line, "outside", f"{module} may not include <{name}>")

    def check_source(self, path, text):
        module = module_of(path)
        if module is None:
            self.report(path, 1, "tree", "belongs to no module of tools/check_includes.py")
            return
        for number, line in enumerate(text.splitlines(), 1):
            if match := INCLUDE.match(line):
                self.check_include(path, number, match.group(2))
                continue
            code = re.sub(r'"(\\.|[^"\\])*"', '""', line).split("//")[0]
            if module == "tests" or path.startswith(("lab/bench/kernels/", "lab/bench/peers/")):
                continue
            if ENVIRONMENT.search(code) and path != "src/core/config.cc":
                self.report(path, number, "environment", "only src/core/config.cc reads it")
            if RANDOM.search(code):
                self.report(path, number, "random", "draw_random() of core/random_bytes.h works with glibc 2.35, too")
            if path.startswith(("src/", "lab/")) and Path(path).suffix in (".cc", ".h") and LOUD.search(code):
                self.report(path, number, "silence", "the library does not print or end the process")
        if Path(path).suffix in (".h", ".cuh", ".hpp") and not path.endswith("-inl.h") and "#pragma once" not in text:
            self.report(path, 1, "header", "no #pragma once")

    def check_types(self, path, text, types):
        """Types at namespace scope, which stands at the first column; nested ones are not looked at."""
        for number, line in enumerate(text.splitlines(), 1):
            if match := TYPE.match(line):
                first = types.setdefault(match.group(1), f"{path}:{number}")
                if first != f"{path}:{number}":
                    self.report_once(path, number, "types", f"{match.group(1)} is also defined in {first}")

    def check_sizes(self, path, text):
        lines = text.count("\n")
        limit = HEADER_LINES if path.endswith(HEADER_SUFFIXES) else SOURCE_LINES
        if lines > limit:
            self.report(path, lines, "size", f"{lines} lines, limit {limit}")

    def check_names(self):
        by_name = defaultdict(list)
        for path, _ in self.files(("include", "src", "lab", "cli", "python"), {".h", ".cuh", ".hpp"}):
            by_name[Path(path).name].append(path)
        for name, paths in by_name.items():
            if len(paths) > 1:
                self.report(paths[1], 1, "names", f"two headers are called {name}: {', '.join(paths)}")

    def check_standard(self, texts):
        includes = Includes(texts, self.resolve)
        for path in texts:
            if path.endswith(".cc") and path.startswith(PRECOMPILED):
                for line, name, headers in includes.missing(path):
                    self.report(path, line, "uses", f"{name} without including {' or '.join(headers)}")

    def run(self):
        sources = dict(self.files(SOURCE_FOLDERS, SOURCE_SUFFIXES))
        texts = dict(self.files(TEXT_FOLDERS, TEXT_SUFFIXES))
        texts.update({p.name: p for p in self.root.iterdir() if p.suffix in TEXT_SUFFIXES})
        for path, file in sorted((sources | texts).items()):
            data = file.read_bytes()
            for number, line in enumerate(data.split(b"\n"), 1):
                if not line.isascii():
                    self.report(path, number, "ascii", repr(line.strip()[:60]))
            if path in sources:
                text = data.decode("utf-8", "replace")
                self.check_source(path, text)
                self.check_sizes(path, text)
                if path.startswith(TYPE_FOLDERS):
                    self.check_types(path, text, self.types)
                if path.startswith(TYPE_HEADER_FOLDERS) and path.endswith(HEADER_SUFFIXES):
                    self.check_types(path, text, self.types_of_headers)
        self.check_names()
        self.check_standard({p: f.read_text(errors="replace") for p, f in sources.items()})
        return len(sources)


def main():
    root = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    scan = Scan(root)
    count = scan.run()
    for violation in scan.violations:
        print(violation)
    print(f"{count} source files, {len(scan.violations)} violations")
    return 1 if scan.violations or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
