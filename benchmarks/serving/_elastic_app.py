"""The service as it ships, with a wait in retrieval that stands for the time of a device: batches one after the other, as on a GPU."""

import asyncio
import os
from typing import Any

from ray import serve

from raysys.serve import app, deployments
from raysys.serve.models import retrieve_many

WAIT_S = float(os.environ.get("ELASTIC_WAIT_S", "0.05"))


class DeviceRetrieval(deployments.Retrieval.func_or_class):
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def retrieve(self, requests: list) -> list[Any]:
        answers = self._models.answer("retrieval", requests, retrieve_many)
        await asyncio.sleep(WAIT_S)
        return answers


def build(args: app.AppArgs) -> serve.Application:
    retrieval = serve.deployment(DeviceRetrieval, name="Retrieval")
    return app.assemble(args, deployments.Ingress, retrieval, deployments.Ranking, deployments.Ingestion)
