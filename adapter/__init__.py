"""The HTTP service that speaks the Athena contract; it knows Prefect runs and the catalog, and keeps no state."""
