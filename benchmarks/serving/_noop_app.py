"""The floor: an app with the same hops as the service (HTTP -> deployment -> deployment) that computes nothing."""

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.handle import DeploymentHandle

app = FastAPI()


class NoopArgs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hops: int = 2


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=200)
class Far:
    async def __call__(self, body: bytes) -> bytes:
        return body


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=200)
@serve.ingress(app)
class Near:
    def __init__(self, first: DeploymentHandle, second: DeploymentHandle, hops: int):
        self._handles = [first, second][:hops]

    @app.get("/health/live")
    async def live(self) -> dict:
        return {"status": "live"}

    @app.post("/v1/recommend")
    async def recommend(self, request: Request) -> dict:
        body = await request.body()
        for handle in self._handles:
            body = await handle.remote(body)
        return {"bytes": len(body)}


def build(args: NoopArgs) -> serve.Application:
    return Near.bind(Far.options(name="First").bind(), Far.options(name="Second").bind(), args.hops)
