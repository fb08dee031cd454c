"""Everything worth measuring while a GPU is at hand for minutes: `benchmarks/gpu_day.sh`, described in `docs/gpu-day.md`.

- `__main__`: command line; `settings`: sizes of the day and of its rehearsal; `report`: the JSON that grows with each measurement
- `lacking`: which carried wheels the machine needs
- `machine_facts`: the machine and its own rates; `checks`: tests and `lathe check`
- `encode_table`: which cases, in which order, and their rows; `forms`: the network in each form that the table compares
- `suspicions`: one measurement for each suspicion of the review of the GPU paths; `training_step`; `profiles`: launches, time by kernel
"""
