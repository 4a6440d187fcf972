"""The calls that ask: recommend, rank, similar. What was answered is noted as an impression."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from raysys.errors import SchemaError
from raysys.serve.api import LIMITS, AnswerBody, RankBody, RecommendBody
from raysys.serve.ingest import ImpressionBuffer
from raysys.serve.openapi import body_of, query_of, with_deadline
from raysys.serve.recommender import Recommender
from raysys.serve.replies import JSON, read_json, read_query
from raysys.serve.request import DEADLINE_HEADER, Deadline


def asking(recommender: Recommender, impressions: ImpressionBuffer) -> APIRouter:
    """Routes of the answers."""
    router = APIRouter()

    def shown(answer: dict[str, Any]) -> Response:
        impressions.add(answer)
        return JSON(answer)

    @router.post("/v1/recommend", response_model=AnswerBody, openapi_extra=with_deadline(body_of(RecommendBody)))
    async def recommend(request: Request) -> Response:
        """Personal recommendations for a user, a session or an inline history."""
        due = deadline_of(request)
        return shown(await recommender.recommend(RecommendBody.model_validate(await read_json(request)), due))

    @router.get("/v1/recommend/{user_id}", response_model=AnswerBody, openapi_extra=with_deadline(query_of("n", "k", "top_k", "offset")))
    async def recommend_user(user_id: str, request: Request) -> Response:
        """The same for one user, by GET."""
        asked = {**read_query(request, "n", "k", "top_k", "offset"), "user_id": user_id}
        return shown(await recommender.recommend(RecommendBody.model_validate(asked), deadline_of(request)))

    @router.post("/v1/rank", response_model=AnswerBody, openapi_extra=with_deadline(body_of(RankBody)))
    async def rank(request: Request) -> Response:
        """The given candidates in the user's order."""
        due = deadline_of(request)
        return shown(await recommender.rank(RankBody.model_validate(await read_json(request)), due))

    @router.get("/v1/items/{item_id}/similar", response_model=AnswerBody, openapi_extra=with_deadline(query_of("n")))
    async def similar(item_id: str, request: Request) -> Response:
        """Items that go with one item."""
        text = read_query(request, "n").get("n", "10")
        if not text.isdecimal() or not 1 <= int(text) <= LIMITS.max_n:
            raise SchemaError(f"n: expected a whole number from 1 to {LIMITS.max_n}, got {text[:20]!r}")
        return JSON(await recommender.similar(item_id, int(text), deadline_of(request)))

    return router


def deadline_of(request: Request) -> Deadline | None:
    """When the client wants its answer; its clock starts before the body is read.

    Raises:
        SchemaError: see `Deadline.of`.
    """
    return Deadline.of(request.headers.get(DEADLINE_HEADER))
