#!/usr/bin/env python3
"""Checks that every line of a document fits 120 columns, and every comment of a source 100.

    tools/check_docs.py [ROOT]

Documents are the Markdown files of the root and of docs/; their tables and blocks of code count, too. clang-format
leaves comments as their authors wrote them (.clang-format, ReflowComments), so their width is checked here.
"""
import re
import sys
from pathlib import Path

DOCUMENT_COLUMNS = 120
COMMENT_COLUMNS = 100
SOURCE_FOLDERS = ("include", "src", "cli", "lab", "bench", "python", "tests")
SOURCE_SUFFIXES = {".h", ".cc", ".cuh", ".cu"}
LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"')


def wide_lines(root):
    """(path, line number, columns, limit) of every line that is too wide, and how many files were read."""
    wide, num_files = [], 0

    def scan(file, limit, counts):
        nonlocal num_files
        num_files += 1
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > limit and counts(line):
                wide.append((file.relative_to(root), number, len(line), limit))

    for file in [*root.glob("*.md"), *(root / "docs").glob("**/*.md")]:
        scan(file, DOCUMENT_COLUMNS, lambda line: True)
    for folder in SOURCE_FOLDERS:
        for file in (root / folder).glob("**/*"):
            if file.suffix in SOURCE_SUFFIXES:
                scan(file, COMMENT_COLUMNS, has_comment)
    return sorted(wide), num_files


def has_comment(line):
    """A `//` that is not inside a string literal."""
    return "//" in LITERAL.sub('""', line)


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    wide, num_files = wide_lines(root)
    for path, number, columns, limit in wide:
        print(f"{path}:{number}: {columns} columns, at most {limit}")
    print(f"{num_files} files, {len(wide)} lines too wide")
    return 1 if wide or not num_files else 0


if __name__ == "__main__":
    sys.exit(main())
