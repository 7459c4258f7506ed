"""Fixed-point problems: maps with known properties, equations of other suites, a convolutional cell, and digits."""
