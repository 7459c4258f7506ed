"""The benchmark suite: pydeq compared with its peers on the same functions, in one process. See README.md."""
