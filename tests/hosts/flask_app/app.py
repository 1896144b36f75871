"""A Flask application on PostgreSQL: sessions, its own users table, views behind the decorators."""

import os
from typing import Any

import psycopg
from flask import Flask, g, request, session
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from tests.hosts.documents import MANUAL, run
from tests.hosts.streaming import model
from trueup.billing.decorators import ai_tokens, require_active_subscription, require_ai_tokens
from trueup.billing.utils import get_accurate_tokens_remaining

SECRET_KEY = "only-for-tests"

app = Flask(__name__)
app.secret_key = SECRET_KEY
needs_tokens = require_ai_tokens(estimated_tokens=1500, feature_name="My Feature")


@app.post("/login")
def log_in() -> str:
    session["user_id"] = find_user(request.form["username"])
    return ""


def find_user(name: str) -> int | None:
    with psycopg.connect(os.environ["HOST_DATABASE_URL"]) as connection:
        row = connection.execute("SELECT id FROM accounts_user WHERE username = %s", [name]).fetchone()
    return row[0] if row else None


@app.before_request
def know_the_user() -> None:
    if "user_id" in session:
        g.user = {"id": session["user_id"]}


@app.post("/view")
@needs_tokens
def view() -> dict[str, Any]:
    return {"user": g.user["id"]}


@app.post("/async-view")
@needs_tokens
async def async_view() -> dict[str, Any]:
    return {"user": g.user["id"]}


@app.post("/subscribers")
@require_active_subscription()
def subscribers_only() -> dict[str, Any]:
    return {"user": g.user["id"]}


@app.post("/spend")
@require_ai_tokens(estimated_tokens=1000, feature_name="Spending")
def spend() -> dict[str, int]:
    with ai_tokens(g.user["id"], 1000, "Spending", "chat", key=request.headers.get("Idempotency-Key")) as hold:
        hold.charge(prompt_tokens=600, completion_tokens=400, model_name="m")
    return {"tokens_left": hold.tokens_left}


@app.get("/counts")
def counts() -> list[int]:
    return list(get_accurate_tokens_remaining(g.user["id"]))


def summarize(_: bytes) -> str:
    return "generated"


manual = run(MANUAL, "Flask", secret_key=SECRET_KEY, summarize=summarize)["app"]
another_user = run(MANUAL, "Another user", owner_of=lambda team_id: team_id, summarize=summarize)["app"]
streaming = run(MANUAL, "Streaming from Flask", secret_key=SECRET_KEY, model=model)["app"]
served = DispatcherMiddleware(app, {"/manual": manual, "/another": another_user, "/streaming": streaming})
