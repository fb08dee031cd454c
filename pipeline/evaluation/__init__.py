"""`lathe evaluate`: how well a network gives back the clips of a corpus.

`evaluate` (the order of things), `samples` (those under way), `measuring` (the calls into `model/`),
`rows` (a line for each clip and reject), `plots`, `table` (how it reads on a terminal). The maths is `model.evaluation`. See
docs/evaluation.md.
"""
