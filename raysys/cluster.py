"""Which Ray cluster a command runs on. Never one it was not told about.

`ray.init()` without an address joins any cluster it finds on the machine; a
training run could then land in somebody's production. So: the address given,
else `RAY_ADDRESS` (set inside a submitted job), else a private local cluster.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

from raysys import storage
from raysys.errors import ConfigError

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""How torch's threads wait. Spinning costs a busy machine a factor of five or more, never spinning an idle one a third of its speed: a
thousand turns (microseconds) lie between. The second name is for libgomp, which torch has; read once, when torch is loaded; docs/LOG.md."""
INSIDE_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable in the driver of a submitted job."""


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Run a block connected to Ray; a cluster started here is stopped at the end.

    A connection that already exists (a test, a notebook, an outer command) is used and left as it is.
    """
    # Ray warns at every start that a later release will stop hiding GPUs from zero-GPU tasks.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    # A line of it at every command would bury ours; docs/serving.md says what it means.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    # Ray's own handler drains the node for half a minute first, and would outlive it. One that leaves by an exception comes by here.
    is_ours = on_sigterm is not None and threading.current_thread() is threading.main_thread()
    try:
        if is_ours and callable(on_sigterm):
            signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        ray.shutdown()
        if is_ours:
            signal.signal(signal.SIGTERM, on_sigterm)


def location(value: str, what: str) -> str:
    """A path or URI from the command line, made absolute.

    Raises:
        ConfigError: a relative path inside a submitted job, whose working directory is a temporary copy.
    """
    if "://" in value or os.path.isabs(value):
        return value
    if INSIDE_JOB in os.environ:
        raise ConfigError(
            f"{what}: expected an absolute path or a URI inside a submitted job, got {value!r}; "
            "the job's working directory is a temporary copy that is deleted with it"
        )
    return storage.resolve(value)[1]
