"""A FastAPI application whose users have a JWT, and Starlette endpoints beside it."""

from typing import Annotated, Any

import jwt
from fastapi import Depends, FastAPI, Header, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tests.hosts.documents import MANUAL, run
from tests.hosts.people import JWT_SECRET
from tests.hosts.streaming import model, two_answers, two_answers_asynchronously
from trueup.billing.decorators import ai_tokens, require_active_subscription, require_ai_tokens
from trueup.billing.frameworks.fastapi import active_subscription_required, ai_tokens_required, answer_denials
from trueup.billing.streaming import astream_with_tokens, stream_with_tokens
from trueup.billing.utils import get_accurate_tokens_remaining
from trueup.llm.model import Message
from trueup.llm.running import spending_from

app = FastAPI()
answer_denials(app)
unanswering = FastAPI()
needs_tokens = require_ai_tokens(estimated_tokens=1500, feature_name="My Feature")


def user_of(token: str) -> int:
    return int(jwt.decode(token, JWT_SECRET, algorithms=["HS256"])["user_id"])


def current_user(
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
) -> int | None:
    return user_of(credentials.credentials) if credentials else None


CurrentUser = Annotated[int | None, Depends(current_user)]


@app.middleware("http")
async def know_the_user(request: Request, call_next: Any) -> Any:
    authorization = request.headers.get("Authorization", "")
    if authorization and not request.url.path.startswith("/starlette/"):  # there the authentication does this
        request.state.user = user_of(authorization.removeprefix("Bearer "))
    return await call_next(request)


@app.post("/depends")
@needs_tokens
def with_dependency(current_user: CurrentUser) -> dict[str, Any]:
    return {"user": current_user}


@app.post("/async-depends")
@needs_tokens
async def async_with_dependency(text: str = "", user: int | None = Depends(current_user)) -> dict[str, Any]:
    return {"user": user, "text": text}


@app.post("/request")
@needs_tokens
def with_request(request: Request) -> dict[str, Any]:
    return {"user": request.state.user}


@app.post("/chosen-by-the-caller")
@needs_tokens
def with_a_user_that_is_none(request: Request, user: int) -> dict[str, Any]:
    return {"user": request.state.user, "asked_for": user}


@app.post("/unknown")
@needs_tokens
def without_a_user(user: int) -> dict[str, Any]:
    return {"user": user}


def whom_it_is_about(number: int) -> int:
    return number


@app.post("/about-another")
@needs_tokens
def about_another(user: Annotated[int, Depends(whom_it_is_about)], current_user: CurrentUser) -> dict[str, Any]:
    return {"user": current_user, "about": user}


@app.post("/dependency", dependencies=[Depends(ai_tokens_required(1500, "My Feature", user=current_user))])
async def behind_dependency(user: CurrentUser) -> dict[str, Any]:
    return {"user": user}


@app.post("/dependency-of-state", dependencies=[Depends(ai_tokens_required(1500, "My Feature"))])
def behind_dependency_of_state(request: Request) -> dict[str, Any]:
    return {"user": request.state.user}


@unanswering.post("/dependency", dependencies=[Depends(ai_tokens_required(1500, "My Feature", user=current_user))])
def behind_unanswered_dependency() -> None:
    return None


@app.post("/subscribers")
@require_active_subscription
async def subscribers_only(user: CurrentUser) -> dict[str, Any]:
    return {"user": user}


@app.post("/subscribers-dependency", dependencies=[Depends(active_subscription_required(user=current_user))])
def subscribers_by_dependency(user: CurrentUser) -> dict[str, Any]:
    return {"user": user}


@app.post("/spend")
async def spend(user: CurrentUser, idempotency_key: Annotated[str | None, Header()] = None) -> dict[str, int]:
    """No decorator: the application's own handlers answer the errors of `ai_tokens`."""
    async with ai_tokens(user, 1000, "Spending", "chat", key=idempotency_key) as hold:
        await hold.acharge(prompt_tokens=600, completion_tokens=400, model_name="m")
    return {"tokens_left": hold.tokens_left}


@app.post("/two-answers")
def answer_twice(text: str, user: CurrentUser) -> StreamingResponse:
    """Two calls of the model, far apart: Starlette runs each step in a thread with a context of its own."""
    return StreamingResponse(stream_with_tokens(two_answers(text), user, 1500, "Answers"))


@app.post("/async-two-answers")
async def answer_twice_asynchronously(text: str, user: CurrentUser) -> StreamingResponse:
    return StreamingResponse(await astream_with_tokens(two_answers_asynchronously(text), user, 1500, "Answers"))


@app.post("/by-hand")
def answer_by_hand(text: str, user: CurrentUser) -> StreamingResponse:
    """A generator that manages its hold itself. It is resumed, and maybe closed, in other contexts."""

    def chunks() -> Any:
        with ai_tokens(user, 1500, "Answers") as hold, spending_from(hold.hold):
            yield from model.stream([Message(role="user", content=text)])

    return StreamingResponse(chunks())


@app.post("/async-by-hand")
async def answer_by_hand_asynchronously(text: str, user: CurrentUser) -> StreamingResponse:
    async def chunks() -> Any:
        async with ai_tokens(user, 1500, "Answers") as hold, spending_from(hold.hold):
            async for chunk in model.astream([Message(role="user", content=text)]):
                yield chunk

    return StreamingResponse(chunks())


@app.get("/counts")
def counts(user: CurrentUser) -> tuple[int, int, int]:
    return get_accurate_tokens_remaining(user)


class _User(BaseUser):
    def __init__(self, number: int) -> None:
        self.id = number

    @property
    def is_authenticated(self) -> bool:
        return True


class _Backend(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        authorization = conn.headers.get("Authorization")
        if not authorization:
            return None
        return AuthCredentials(), _User(user_of(authorization.removeprefix("Bearer ")))


@needs_tokens
def starlette_function(request: Any) -> JSONResponse:
    return JSONResponse({"user": request.user.id})


class StarletteEndpoint(HTTPEndpoint):
    @needs_tokens
    async def post(self, request: Any) -> JSONResponse:
        return JSONResponse({"user": request.user.id})


async def summarize(_: Any) -> str:
    return "generated"


starlette = Starlette(
    routes=[
        Route("/function", starlette_function, methods=["POST"]),
        Route("/class", StarletteEndpoint),
        Route("/manual", run(MANUAL, "Starlette", summarize=summarize)["summary"], methods=["POST"]),
        Route("/streaming", run(MANUAL, "Streaming from Starlette", model=model)["summary"], methods=["POST"]),
    ],
    middleware=[Middleware(AuthenticationMiddleware, backend=_Backend())],
)
app.mount("/starlette", starlette)
app.mount("/unanswering", unanswering)
app.mount("/manual", run(MANUAL, "FastAPI", current_user=current_user, summarize=summarize)["app"])
app.mount("/streaming", run(MANUAL, "Streaming from FastAPI", current_user=current_user, model=model)["app"])
