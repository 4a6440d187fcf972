"""One small Ray cluster for all modules that need no other; they come first, and what has its own cluster afterwards."""

import logging
import os

import pytest

SHARED = "ray_cluster"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sharing = {item.path for item in items if SHARED in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in sharing)  # stable: otherwise the order stays


@pytest.fixture(scope="session")
def ray_cluster():
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    yield
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def nothing_left_of_the_shared_cluster(request: pytest.FixtureRequest):
    """Before a module that shares nothing: one process can be in one cluster only."""
    if not any(SHARED in item.fixturenames for item in request.session.items if item.path == request.path):
        import ray

        ray.shutdown()
