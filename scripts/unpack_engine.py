#!/usr/bin/env python3
"""Takes the Python files and the metadata out of a wheel: unpack_engine.py WHEEL FOLDER.

What an engine's own code needs to be imported. Compiled kernels, which are most of a wheel, stay in it.
The folder appears when all of it is there.
"""

import re
import sys
import zipfile
from pathlib import Path


def unpack(wheel: Path, folder: Path) -> int:
    unfinished = folder.with_name(folder.name + ".part")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py") or re.match(r"[^/]+\.dist-info/", name)]
        archive.extractall(unfinished, names)
    unfinished.rename(folder)
    return len(names)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
