"""Random kills and storage faults over all commands on an output, and two commands at once, until the rows equal those of a clean run.

- `schedule`: which command is killed at which request, which requests suffer which fault: a pure function of a seed
- `faulting_proxy`: relay in front of the S3 server that applies a schedule
- `corpus`: uploaded inputs and the rows of a clean run
- `commands`: temporary folder and environment of commands, and what they left behind
- `checks`: what a snapshot and its readers must show
- `lifecycle`: encode, publish, takedown, compact and gc under a schedule
- `races`: one command is held at a request while another runs to its end
- `builds`: two and three builds of one output at once
- `nodes`: Ray cluster of several raylets whose actors, raylets and nodes are killed
- `__main__`: `make chaos`
"""
