"""Which sources are done and which rows count: receipts, their summaries, overlaps."""
