"""Real webhooks through the whole path: ``python -m examples.demo``, or ``make demo``."""
