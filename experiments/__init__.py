"""Training, data sets and the paper's experiments: programs on :mod:`pydeq`, run from a checkout.

``python -m experiments train | reproduce | data``; see docs/experiments.
"""
