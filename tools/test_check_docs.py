#!/usr/bin/env python3
"""Plants lines that are too wide and sees tools/check_docs.py report them, and nothing else."""
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

CHECK = Path(__file__).resolve().parent / "check_docs.py"
CLEAN = {
    "README.md": "# A title\n\n" + "w" * 120 + "\n",
    "docs/page.md": "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "src/core/thing.cc": "// " + "c" * 97 + "\n" + 'auto url = "http://' + "x" * 100 + '";\n',
}


def check(changes):
    with tempfile.TemporaryDirectory() as folder:
        for path, text in (CLEAN | changes).items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        done = subprocess.run([sys.executable, CHECK, folder], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()


class Planted(unittest.TestCase):
    def expect(self, path, text, report):
        status, lines = check({path: text})
        self.assertEqual((status, lines[:-1]), (1, [report]))

    def test_clean_tree_passes(self):
        self.assertEqual(check({}), (0, ["3 files, 0 lines too wide"]))

    def test_prose(self):
        self.expect("docs/page.md", "\n" + "w" * 121 + "\n", "docs/page.md:2: 121 columns, at most 120")

    def test_title_page(self):
        self.expect("README.md", "w " * 80, "README.md:1: 160 columns, at most 120")

    def test_table(self):
        self.expect("docs/deep/page.md", "| " + "w" * 150 + " |\n", "docs/deep/page.md:1: 154 columns, at most 120")

    def test_block_of_code(self):
        self.expect("docs/page.md", "```\n" + "w" * 130 + "\n```\n", "docs/page.md:2: 130 columns, at most 120")

    def test_comment(self):
        self.expect("include/sluice/thing.h", "// " + "c" * 98 + "\n",
                    "include/sluice/thing.h:1: 101 columns, at most 100")

    def test_comment_after_code(self):
        self.expect("src/core/thing.cc", 'f("//");  // ' + "c" * 100 + "\n",
                    "src/core/thing.cc:1: 113 columns, at most 100")

    def test_an_empty_tree_is_no_success(self):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, CHECK, folder], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)


if __name__ == "__main__":
    unittest.main()
