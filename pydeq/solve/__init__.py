"""One solve: the loop, compaction, step reports, and ranks that agree."""
