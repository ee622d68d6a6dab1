"""Programs to run and to copy from: ``quickstart`` first, ``demo`` for the whole path."""
