"""Driver of a build: finds the work, hands out shards, handles failures, reports.

- `encode`: entry point; checks the job, finds the work, runs the build, judges the result
- `coverage`, `retries`, `unchanged`: sources without a counted receipt; rejects to encode again; inputs that were only touched
- `compile_choice`: whether the network is compiled, as the output was begun; `compile_estimate`: whether that pays in a new one
- `other_settings`: which settings differ from those that inputs were encoded with before
- `build`: one run over the shards to do
- `budget`: limits of hours, shards and GPU hours; decisions of the caller
- `executor`: inline or Ray, chosen by the job
- `dispatch`, `worker_loads`: which worker gets which shard, what is retried, copied or given up; which workers are free
- `blamed_videos`, `draining`: videos that end workers; shards whose node goes away
- `outage`, `worker_disks`, `reject_budget`: a store that is away; workers whose disk is full; when damage stops a build
- `observer`, `heartbeat`, `run_log`: what a build shows to others; progress object and log in the output
- `live_counts`, `worker_activity`, `progress`, `report`: sums over workers; what each does; progress for a display; the result
- `summary_keeper`: cache of receipt summaries, for the next run
- `running_median`: median of the shard times
"""
