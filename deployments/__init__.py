"""When and where flows run: schedules, deployments, the command line and the foreground service."""
