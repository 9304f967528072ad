#!/usr/bin/env python3
"""Plants one violation of each kind and sees tools/check_includes.py report it."""
import tempfile
import unittest
from pathlib import Path

from check_includes import Scan

HEADER = "#pragma once\n"
CLEAN = {
    "include/sluice/tensor.h": HEADER + "#include <cstdint>\n",
    "include/sluice/engine.h": HEADER + '#include "sluice/tensor.h"\n',
    "include/sluice/exchange.h": HEADER + '#include "sluice/tensor.h"\n',
    "include/sluice/lab/accuracy.h": HEADER + '#include "sluice/engine.h"\n',
    "lab/accuracy/metrics.h": HEADER,
    "lab/accuracy/metrics.cc": '#include "sluice/lab/accuracy.h"\n',
    "src/core/fail.h": HEADER + "#include <fmt/core.h>\n#include \"sluice/tensor.h\"\n",
    "src/core/config.cc": "#include <cstdlib>\nauto v = std::getenv(\"X\");\n",
    "src/core/mmap.cc": "#include <sys/mman.h>\n",
    "src/quant/quant.cc": '#include "core/fail.h"\n',
    "src/transport/device.cuh": HEADER,
    "src/transport/mpi_link.cc": "#include <mpi.h>\n",
    "src/backend/ops.h": HEADER + '#include "sluice/tensor.h"\n',
    "src/backend/backend.cc": '#include "backend/cpu/pool.h"\n#include "backend/cuda/w4a8.h"\n',
    "src/backend/cpu/pool.h": HEADER + '#include <hwy/highway.h>\n#include "backend/ops.h"\n',
    "src/backend/cuda/w4a8.h": HEADER,
    "src/backend/cuda/ptx/copy.cuh": HEADER + "#include <cuda_runtime.h>\n",
    "src/exchange/impl.h": HEADER + '#include "backend/ops.h"\n',
    "src/exchange/cuda/send.cu": '#include "backend/cuda/ptx/copy.cuh"\n'
                                 '#include "transport/device.cuh"\n#include "exchange/impl.h"\n',
    "src/engine/engine.cc": '#include "exchange/impl.h"\n#include "sluice/engine.h"\n',
    "src/engine/lane.h": HEADER,
    "cli/command.h": HEADER + "#include <CLI/CLI.hpp>\n",
    "cli/main.cc": '#include "command.h"\n#include "sluice/engine.h"\n'
                   "void f() { exit(1); }  // the program may; the library may not\n",
    "tests/test_any.cc": '#include <gtest/gtest.h>\n#include "exchange/impl.h"\n',
}


def scan(changes):
    with tempfile.TemporaryDirectory() as folder:
        for path, text in (CLEAN | changes).items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        result = Scan(folder)
        result.run()
        return result


class Planted(unittest.TestCase):
    def expect(self, rule, path, text):
        violations = scan({path: text}).violations
        self.assertEqual(len(violations), 1, violations)
        self.assertIn(f": {rule}: ", violations[0])
        self.assertTrue(violations[0].startswith(path), violations[0])

    def test_clean_tree_passes(self):
        self.assertEqual(scan({}).violations, [])

    def test_lower_layer_includes_higher(self):
        self.expect("layering", "src/quant/back.cc", '#include "backend/ops.h"\n')
        self.expect("layering", "src/transport/back.cc", '#include "exchange/impl.h"\n')
        self.expect("layering", "src/core/back.cc", '#include "sluice/engine.h"\n')

    def test_a_folder_uses_a_public_header_from_above(self):
        self.expect("layering", "src/transport/frame.cc", '#include "sluice/engine.h"\n')
        self.expect("layering", "src/transport/frame.cc", '#include "sluice/exchange.h"\n')
        self.expect("layering", "src/backend/cpu/digits.cc", '#include "sluice/exchange.h"\n')
        self.expect("layering", "src/exchange/up.cc", '#include "sluice/engine.h"\n')

    def test_the_runtime_uses_the_laboratory(self):
        self.expect("layering", "src/backend/cpu/digits.cc", '#include "sluice/lab/accuracy.h"\n')
        self.expect("layering", "src/engine/up.cc", '#include "sluice/lab/accuracy.h"\n')
        self.expect("layering", "src/engine/up.cc", '#include "accuracy/metrics.h"\n')
        self.expect("layering", "include/sluice/exchange.h",
                    HEADER + '#include "sluice/lab/accuracy.h"\n')

    def test_sideways(self):
        self.expect("layering", "src/backend/cpu/side.cc", '#include "backend/cuda/w4a8.h"\n')
        self.expect("layering", "src/exchange/side.cc", '#include "backend/cpu/pool.h"\n')
        self.expect("layering", "src/exchange/cuda/side.cu", '#include "backend/cuda/w4a8.h"\n')
        self.expect("layering", "src/exchange/side.cc", '#include "transport/device.cuh"\n')

    def test_nothing_includes_the_engine(self):
        self.expect("layering", "lab/reference/up.cc", '#include "engine/lane.h"\n')
        self.expect("layering", "tests/test_up.cc", '#include "engine/lane.h"\n')

    def test_command_line_uses_public_headers_only(self):
        self.expect("layering", "cli/cmd_sly.cc", '#include "core/fail.h"\n')

    def test_a_sideways_path_is_resolved(self):
        self.expect("layering", "src/quant/dots.cc", '#include "../backend/ops.h"\n')

    def test_third_party_in_public_header(self):
        self.expect("outside", "include/sluice/leak.h", HEADER + "#include <fmt/core.h>\n")
        self.expect("outside", "include/sluice/leak.h", HEADER + "#include <cuda_runtime.h>\n")

    def test_third_party_in_the_wrong_folder(self):
        self.expect("outside", "src/quant/simd.cc", "#include <immintrin.h>\n")
        self.expect("outside", "src/exchange/gpu.cc", "#include <cuda_runtime.h>\n")
        self.expect("outside", "src/exchange/mpi_user.cc", "#include <mpi.h>\n")
        self.expect("outside", "src/core/missing.cc", '#include "core/missing.h"\n')

    def test_random(self):
        self.expect("random", "src/exchange/cuda/send.cc", "std::random_device draw;\n")
        self.assertEqual(scan({"src/core/any.cc": "// No std::random_device here.\n"}).violations, [])

    def test_environment(self):
        self.expect("environment", "src/core/mmap.cc", "const char* p = getenv(\"HOME\");\n")

    def test_library_is_silent(self):
        self.expect("silence", "src/core/loud.cc", 'void f() { std::printf("x"); }\n')
        self.expect("silence", "src/core/loud.cc", "void f() { std::abort(); }\n")
        self.assertEqual(scan({"src/core/quiet.cc": "// abort() is banned\nint x = error.exit(1);\n"
                               "int y = exit_status(c);\n"}).violations, [])

    def test_header_names(self):
        found = scan({"src/exchange/fail.h": HEADER}).violations
        self.assertEqual(len(found), 1)
        self.assertIn("two headers are called fail.h", found[0])

    def test_type_names(self):
        one = "namespace a {\nstruct Rows {\n  int n;\n};\n}\n"
        for other in ("namespace b {\nclass Rows final : public Base {};\n}\n",
                      "namespace {\nenum class Rows : int { kAll };\n}\n",
                      "template <class T>\nstruct alignas(64) Rows {};\n"):
            found = scan({"src/core/one.cc": one, "src/quant/two.cc": other}).violations
            self.assertEqual(len(found), 1, other)
            self.assertIn("types: Rows is also defined in src/core/one.cc:2", found[0])
        # Headers of the laboratory count, its sources do not.
        found = scan({"src/core/one.h": HEADER + one, "lab/accuracy/two.h": HEADER + one}).violations
        self.assertEqual(len(found), 1, found)
        self.assertIn("types: Rows is also defined in lab/accuracy/two.h:3", found[0])
        self.assertEqual(scan({"src/core/one.h": HEADER + one, "lab/accuracy/two.cc": one}).violations, [])
        both = scan({"src/core/one.h": HEADER + one, "src/quant/two.h": HEADER + one}).violations
        self.assertEqual(len(both), 1, both)
        for same in ("struct Rows;\n", "struct Rows::Impl {};\n", "struct Other {\n  struct Rows {};\n};\n"):
            self.assertEqual(scan({"src/core/one.cc": one, "src/quant/two.cc": same}).violations, [])

    def test_what_is_used_is_included(self):
        use = "std::vector<int> rows;  // std::map is a comment\n"
        self.expect("uses", "src/core/rows.cc", use)
        self.expect("uses", "lab/files/rows.cc", '#include "core/fail.h"\n' + use)
        for include in ("#include <vector>\n", '#include "core/rows.h"\n'):
            clean = {"src/core/rows.cc": include + use, "src/core/rows.h": HEADER + "#include <vector>\n"}
            self.assertEqual(scan(clean).violations, [])

    def test_pragma_once(self):
        self.expect("header", "src/core/bare.h", "int x;\n")

    def test_unknown_folder(self):
        self.expect("tree", "src/misc/thing.cc", "int x;\n")

    def test_sizes(self):
        self.expect("size", "src/core/long.cc", "\n" * 401)
        self.expect("size", "src/core/long.h", HEADER + "\n" * 250)
        self.assertEqual(scan({"src/core/full.cc": "\n" * 400,
                               "src/core/full.h": HEADER + "\n" * 249}).violations, [])

    def test_ascii(self):
        self.expect("ascii", "src/core/accent.cc", "// na\u00efve\n")
        self.expect("ascii", "docs/accent.md", "\u2192\n")


if __name__ == "__main__":
    unittest.main()
