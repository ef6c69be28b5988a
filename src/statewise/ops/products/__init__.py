"""Products of large matrices by small ones."""
