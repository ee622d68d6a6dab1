"""For third parties' things that a user may have; nothing else of the package imports it."""
