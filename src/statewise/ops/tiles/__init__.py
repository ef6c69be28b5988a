"""Products of matrices that are small enough for the nearest cache, for the kernels of the other ops."""
