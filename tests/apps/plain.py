"""A Celery app that has no JetStream."""

from celery import Celery

app = Celery("plain", broker="memory://")
