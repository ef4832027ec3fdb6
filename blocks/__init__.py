"""Prefect blocks: the hashes of API keys, and the stores with their credentials."""
