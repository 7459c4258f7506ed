"""The benchmark suite: pydeq beside its peers on the same functions, in one process. See README.md."""
