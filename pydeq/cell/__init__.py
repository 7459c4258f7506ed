"""The user's function, prepared for a solve: autocast, compilation, random numbers, parameters, linearization."""
