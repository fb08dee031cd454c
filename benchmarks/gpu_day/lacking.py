"""Carried wheels of packages that this interpreter lacks. Takes paths of wheels, prints those to install, names the others on stderr.

A carried package in front of the machine's own breaks packages of the machine that need their version: transformers 5.17 refuses
huggingface_hub 2, and diffusers imports transformers if it is there.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(paths: list[str]) -> None:
    """Prints the paths of `paths` whose package has no version here."""
    present = []
    for path in paths:
        name, carried = Path(path).name.split("-")[:2]
        try:
            found = version(name)
        except PackageNotFoundError:
            print(path)
        else:
            present.append(f"{name} {found}" if found == carried else f"{name} {found} (carried: {carried})")
    if present:
        print(f"== packages of this machine are used for: {', '.join(present)}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
