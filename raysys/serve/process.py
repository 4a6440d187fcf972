"""The process that `launch.py` starts: a private Ray cluster with the Serve app, until SIGTERM.

python -m raysys.serve.process CONFIG.json [--fast]
"""

import json
import os
import signal
import sys
import threading


def main(path: str, *, fast: bool) -> None:
    """Run the app of a Serve config file."""
    # Inherited by everything Ray starts, so that all of it can be found and ended.
    os.environ["RAYSYS_SERVICE"] = str(os.getpid())
    if fast:
        from raysys.serve.app import FAST_SETTINGS

        os.environ.update(FAST_SETTINGS)
        os.execv(sys.executable, [sys.executable, "-m", "raysys.serve.process", path])  # Ray reads some settings at import
    import ray
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    with open(path) as file:
        schema = ServeDeploySchema.model_validate(json.load(file))
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    ray.init(address="local", include_dashboard=False, log_to_driver=True, namespace="serve", configure_logging=False)
    from ray.serve._private.api import serve_start

    client = serve_start(
        http_options=schema.http_options.model_dump(),
        global_logging_config=schema.logging_config,
        proxy_location=schema.proxy_location,
    )
    client.deploy_apps(schema)
    done.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], fast="--fast" in sys.argv)
