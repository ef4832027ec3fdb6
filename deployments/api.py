"""The factory of the adapter's ASGI application for `uvicorn --factory deployments.api:create`."""

from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI

from adapter.app import create_app
from athena_backup.settings import load_settings
from blocks.keys import hash_of, load_hashes


def create() -> FastAPI:
    """The adapter with this process's settings; keys from ATHENA_API_KEYS, else the hashes that Prefect keeps."""
    settings = load_settings()
    given = [hash_of(key.get_secret_value()) for key in settings.athena_api_keys]
    # In a thread: the server calls this inside its event loop, where Prefect would hand out a coroutine instead.
    with ThreadPoolExecutor(max_workers=1) as thread:
        kept = [] if given else thread.submit(load_hashes, settings.athena_namespace).result()
    return create_app(settings, given or kept)
