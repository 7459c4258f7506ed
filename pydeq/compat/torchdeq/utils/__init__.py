"""Configuration, command-line arguments, initial states, gradient checkpointing."""

from pydeq.compat.torchdeq.utils.arg_utils import add_deq_args
from pydeq.compat.torchdeq.utils.config import DEQConfig
from pydeq.compat.torchdeq.utils.init import mixed_init
from pydeq.compat.torchdeq.utils.mem import mem_gc

__all__ = ["DEQConfig", "add_deq_args", "mem_gc", "mixed_init"]
