"""The process that executes runs of the served deployments; started by `athena-backup up`."""

import logging
import os

from prefect import serve

from athena_backup.settings import load_settings
from deployments.definitions import deployments


def main() -> None:
    """Register the deployments and serve them until SIGTERM."""
    logging.getLogger("prefect.runner").setLevel(logging.WARNING)
    mark = os.environ.get("ATHENA_START_MARK")
    served = deployments(load_settings())
    for deployment in served:
        deployment.version = mark
    serve(*served, pause_on_shutdown=False, print_starting_message=False)


if __name__ == "__main__":
    main()
