"""Who runs the stages: inline in this process, or on Ray actors. The only place where Ray appears."""
