"""What a raylet of the suite runs for each worker: `launcher.py SETUP_WORKER DEFAULT_WORKER ARGUMENTS`, as Ray's own command without it.

Ray's `setup_worker.py` imports Ray, prepares the worker's runtime environment and executes `default_worker.py`, which imports Ray again.
Where there is no runtime environment, as for all jobs but submitted ones, this executes `default_worker.py` at once.
"""

import json
import os
import sys

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="

python, arguments = sys.argv[1], sys.argv[2:]
context = [json.loads(text.removeprefix(CONTEXT) or "{}") for text in arguments if text.startswith(CONTEXT)]
if not any(
    any(found.get(name) for name in ("env_vars", "command_prefix", "override_worker_entrypoint")) for found in context
):
    arguments = [text for text in arguments[1:] if not text.startswith((CONTEXT, LANGUAGE))]
os.execv(python, [python, *arguments])
