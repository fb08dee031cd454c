"""The operating-system process.

- `signals`: SIGINT, SIGTERM and SIGHUP of a command
- `scratch`: temporary folders that a kill does not leave behind
- `kill_points`: named points where a test makes the process die, hang or fail
"""
