"""The engine: everything that reads, writes and checks bytes, without Prefect; usable and testable alone."""
