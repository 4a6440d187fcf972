"""The service as it ships, with a wait in retrieval that stands for the time of a device: batches one after the other, as on a GPU."""

import os
import time
from typing import Any

from ray import serve

from raysys.serve import app, deployments

WAIT_S = float(os.environ.get("ELASTIC_WAIT_S", "0.05"))


class DeviceRetrieval(deployments.Retrieval.func_or_class):
    def retrieve_all(self, requests: list) -> list[Any]:
        time.sleep(WAIT_S)  # in the stage's own thread: the event loop goes on, as it would beside a device
        return super().retrieve_all(requests)


def build(args: app.AppArgs) -> serve.Application:
    retrieval = serve.deployment(DeviceRetrieval, name="Retrieval")
    return app.assemble(args, deployments.Ingress, retrieval, deployments.Ranking, deployments.Ingestion)
