"""A whole chain of real processes, and what a seed breaks of it."""
