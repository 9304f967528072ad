#!/usr/bin/env python3
"""Takes all but the compiled libraries out of a wheel: unpack_engine.py WHEEL FOLDER.

What an engine's own code needs to be imported: its Python files, and sources and tables that some of
them look for at once. The libraries are most of a wheel. The folder appears when all of it is there.
"""

import sys
import zipfile
from pathlib import Path


def unpack(wheel: Path, folder: Path) -> int:
    unfinished = folder.with_name(folder.name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".so")]
        archive.extractall(unfinished, names)
    unfinished.rename(folder)
    return len(names)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
