"""How loops are compiled and kept for the next process."""
