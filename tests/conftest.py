import os
import secrets

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAYSYS_TEST_RUN"] = secrets.token_hex(8)  # all processes that the tests start have it: nobody else's is to be killed


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory):
    """Keys, registries and Ray's token go to a folder of the test run, never to the home of whoever runs it."""
    folder = tmp_path_factory.mktemp("home")
    before = {name: os.environ.get(name) for name in ("RAYSYS_HOME", "RAY_AUTH_MODE")}
    os.environ.update({"RAYSYS_HOME": str(folder), "RAY_AUTH_MODE": "disabled"})
    yield folder
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def planted_bundle(own_home, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a written bundle of the planted world."""
    from tests import planted

    folder = str(tmp_path_factory.mktemp("planted") / "bundle")
    planted.build_bundle().write(folder, manifest=planted.manifest())
    return folder


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory):
    """One server for all tests; each takes a key prefix of its own."""
    from tests.redis_process import RedisProcess

    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(params=["embedded", "redis"])
def place(request: pytest.FixtureRequest, tmp_path):
    """A function from a name to a location for a log or a state, in each implementation."""
    if request.param == "embedded":
        return lambda name: str(tmp_path / name)
    server, prefix = request.getfixturevalue("redis_server"), secrets.token_hex(6)
    return lambda name: f"{server.uri}?prefix={prefix}-{name}"
