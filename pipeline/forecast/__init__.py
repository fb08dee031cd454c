"""`lathe plan`: what a build would do, from headers.

- `survey`: lists and opens the corpus as `lathe encode` does
- `totals`: buckets, drops and bytes, added up
"""
