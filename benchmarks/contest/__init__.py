"""The contest: every solver of every library on every problem, judged from outside."""
