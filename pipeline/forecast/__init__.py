"""`lathe plan`: what a build would do, from headers.

- `survey`: lists the corpus and opens its videos as `lathe encode` does
- `totals`: sums of buckets, drops and bytes
- `compile_forecast`: whether the network would be compiled, and what that takes
"""
