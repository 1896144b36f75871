"""The API with two more routes, which differ only in the gate, for `benchmarks.api`."""

from fastapi import FastAPI, Request

from trueup.api.access import require_tokens
from trueup.api.auth import CurrentUser
from trueup.settings.settings import get_settings
from trueup.worker.http import create_app as create_api
from trueup.worker.http import serve


def create_app() -> FastAPI:
    app = create_api()

    @app.post("/bench/bare")
    def bare(user_id: CurrentUser) -> dict[str, object]:
        return {"user": user_id}

    @app.post("/bench/gated")
    def gated(request: Request, user_id: CurrentUser) -> dict[str, object]:
        require_tokens(request, user_id, 1500, "Benchmark")
        return {"user": user_id}

    return app


if __name__ == "__main__":
    serve(get_settings(), create_app())
