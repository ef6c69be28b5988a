"""Compiled work shared out among threads."""
