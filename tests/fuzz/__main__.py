"""`make fuzz`: batches of mutants for `FUZZ_S` seconds (default: endless). `FUZZ_SEED` is the number of the first batch.

A batch depends only on its number: `FUZZ_SEED=n FUZZ_S=1 make fuzz` repeats batch n. Inputs of a failing batch are kept in
`fuzz-failures/`.
"""

from __future__ import annotations

import faulthandler
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz import batch as batches

HANG_S = 900.0  # for one batch


def main() -> int:
    """Returns exit code 1 if a batch failed."""
    ends = time.monotonic() + float(os.environ.get("FUZZ_S") or math.inf)
    seed = int(os.environ.get("FUZZ_SEED") or random.randrange(1 << 31))
    reasons: Counter[str] = Counter()
    failed = 0
    while True:
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        with tempfile.TemporaryDirectory(prefix="lathe-fuzz-") as folder:
            batch = batches.make(Path(folder) / "batch", seed, mutants=200, files=30, tars=20)
            found, given = batches.check(batch)
            reasons += given
            print(f"seed {seed}: {'ok' if not found else 'FAILED'}  {dict(given.most_common(6))}", flush=True)
            if found:
                failed += 1
                kept = batches.keep(batch, Path("fuzz-failures"))
                print(*(f"  {text}" for text in found), f"  inputs are kept in {kept}", sep="\n", flush=True)
        if time.monotonic() > ends:
            break
        seed += 1
    print(f"{failed} batches failed; reasons given: {dict(reasons.most_common())}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
