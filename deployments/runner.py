"""The process that executes runs of the served deployments; started by `athena-backup up`."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence

from prefect.client.orchestration import get_client
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner

from athena_backup.settings import load_settings
from deployments.definitions import deployments

POLL_SECONDS = 1


class StoppableRunner(Runner):
    """A runner that ends its runs on SIGTERM and waits for them; Prefect's own handler leaves them behind (3.8.8)."""

    def handle_sigterm(self, *args: object, **kwargs: object) -> None:
        """Stop polling, cancel what runs, and let `start` return when all of it has ended."""
        del args, kwargs
        asyncio.get_running_loop().call_soon_threadsafe(
            lambda: setattr(self, "_stop", asyncio.ensure_future(self.astop()))
        )


async def serve(served: Sequence[RunnerDeployment]) -> None:
    """Register the deployments and execute their runs until SIGTERM."""
    runner = StoppableRunner(name="athena-backup", query_seconds=POLL_SECONDS, pause_on_shutdown=False)
    for deployment in served:
        await _forget_named_schedules(f"{deployment.flow_name}/{deployment.name}")
        await runner.aadd_deployment(deployment)
    await runner.start()


async def _forget_named_schedules(name: str) -> None:
    """Delete the schedules of a deployment that somebody gave a slug in Prefect's UI.

    Prefect refuses to put others in their place, or keeps them on where there are to be none (3.8.8); the settings decide.
    """
    async with get_client() as client:
        with contextlib.suppress(ObjectNotFound):
            found = await client.read_deployment_by_name(name)
            for schedule in found.schedules:
                if schedule.slug and schedule.id:
                    await client.delete_deployment_schedule(found.id, schedule.id)


def main() -> None:
    """Serve this process's settings' deployments, under the start mark that `up` waits for."""
    logging.getLogger("prefect.runner").setLevel(logging.WARNING)
    served = deployments(load_settings(), version=os.environ.get("ATHENA_START_MARK"))
    asyncio.run(serve(served))


if __name__ == "__main__":
    main()
