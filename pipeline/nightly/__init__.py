"""`lathe nightly`: list, compare with what is encoded, encode what is new, publish, report. One run at a time, under a lease.

- `run`: a night, from the job to its report
- `approval`: whether the output is of this corpus and of these settings; decided before anything is encoded
- `night`: the report of a night: outcome, changes, rejects, cost
"""
