"""Measurements of the program against what others offer, on one machine."""
