"""What a cache of a given size does for given traffic: analytic, and by simulation."""
