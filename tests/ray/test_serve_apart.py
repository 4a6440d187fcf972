"""Retrieval and ranking in deployments of their own (`placement: apart`)."""

import json
import os
import signal
import time

from raysys.bundle import Bundle
from raysys.pipeline import recommend_user
from raysys.registry import Registry
from raysys.serve.launch import running_service
from tests.service import apart_config, call, free_port, ids, replica_pids


def test_stages_in_deployments_of_their_own_answer_alike_and_may_die(planted_bundle, tmp_path):
    (tmp_path / "apart.json").write_text(json.dumps(apart_config()))
    registry = str(tmp_path / "registry")
    Registry(registry).publish(planted_bundle)
    own = {"registry": registry, "events": str(tmp_path / "events"), "state": str(tmp_path / "state")}
    bundle = Bundle.open(planted_bundle)
    expected = [bundle.item_ids[row] for row in recommend_user(bundle, "user-7", 10).items]
    with running_service(**own, port=free_port(), config_path=str(tmp_path / "apart.json")) as url:
        assert ids(url, user_id="user-7", n=10) == expected
        victims = [pid for name in ("Retrieval", "Ranking") for pid in replica_pids(name)]
        assert len(victims) >= 2
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        deadline, answer = time.monotonic() + 60, {"degraded": True}
        while answer["degraded"]:
            assert time.monotonic() < deadline, "the stages did not come back"
            status, answer = call(url, "POST", "/v1/recommend", {"user_id": "user-7", "n": 10})
            assert status == 200 and answer["items"], answer  # degraded while a stage is away, never an error
            time.sleep(0.5)
        assert ids(url, user_id="user-7", n=10) == expected
