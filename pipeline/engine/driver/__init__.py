"""Driver of a build: finds the work, hands out shards, handles failures, reports.

- `encode`: entry point; checks the job, finds the work, runs the build, judges the result
- `coverage`, `retries`, `unchanged`: sources without a counted receipt; rejects to encode again; inputs that were only touched
- `build`: one run over the shards to do
- `executor`: inline or Ray, chosen by the job
- `dispatch`: which worker gets which shard, what is retried, copied or given up
- `outage`, `worker_disks`, `reject_budget`: a store that is away; workers whose disk is full; when damage stops a build
- `heartbeat`, `progress`, `report`: progress object in the output; progress for a display; result of a build
- `running_median`: median of the shard times
"""
