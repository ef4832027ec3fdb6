"""Backup and restore as Prefect flows: who does what in which order, with retries and states."""
