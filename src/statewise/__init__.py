"""Recurrent sequence models: write a recurrence once, train it in parallel, stream it in constant memory."""

__version__ = "0.1.0"
