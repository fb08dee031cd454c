"""Training: what a network learns from, what it is asked for, and how.

Knows nothing of the pipeline: a trainer takes any iterable of clips.
"""
