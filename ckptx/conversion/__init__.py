"""A conversion: what was asked for, planned, proved, run in two processes, reported."""
