"""Fixed-point problems: maps with known properties, a convolutional cell, and digits to train on."""
