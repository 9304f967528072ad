#!/usr/bin/env python3
"""Checks that relative links and #anchors in the repository's Markdown files lead somewhere.

    tools/check_links.py [ROOT]
"""
import re
import sys
from pathlib import Path

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text):
    """The anchors GitHub gives the headings of a Markdown text."""
    found = set()
    for heading in re.findall(r"^#{1,6}\s+(.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(slug)
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    files = sorted(root.glob("*.md")) + sorted((root / "docs").glob("**/*.md"))
    bad = links = 0
    for file in files:
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in LINK.findall(text):
            if re.match(r"[a-z]+:", target):
                continue
            links += 1
            path, _, anchor = target.partition("#")
            other = (file.parent / path) if path else file
            if not other.exists():
                print(f"{file.relative_to(root)}: no such file: {target}")
                bad += 1
            elif anchor and other.suffix == ".md" and anchor not in anchors(
                    other.read_text(encoding="utf-8")):
                print(f"{file.relative_to(root)}: no such heading: {target}")
                bad += 1
    print(f"{len(files)} files, {links} links, {bad} broken")
    return 1 if bad or not files else 0


if __name__ == "__main__":
    sys.exit(main())
