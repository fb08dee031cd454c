"""Signals, temporary folders and deliberate failures of the operating-system process.

- `signals`: SIGINT, SIGTERM and SIGHUP of a command
- `scratch`: temporary folders that are removed even after a kill
- `fork_locks`: locks that are free in a forked process
- `kill_points`: named points where a test makes the process die, hang or fail
"""
