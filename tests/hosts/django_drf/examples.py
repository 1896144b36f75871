"""The code of the specification's examples and of the manual, in this project."""

from typing import Any

from billing.models import FullPlan, Subscription
from django.contrib.auth import get_user_model
from rest_framework.decorators import api_view, permission_classes
from rest_framework.exceptions import PermissionDenied
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from tests.hosts.documents import MANUAL, SPECIFICATION, run
from tests.hosts.streaming import model
from trueup.llm.model import Completion


class _Service:
    """The parts that the examples leave to the reader."""

    def generate(self, *_: Any) -> str:
        return "generated"

    def complete(self, _: Any, *, max_tokens: int) -> Completion:
        return Completion(
            text=f"of at most {max_tokens}",
            prompt_tokens=200,
            completion_tokens=100,
            total_tokens=300,
            model_name="m",
            response_time_ms=1,
        )


_rest = {"APIView": APIView, "IsAuthenticated": IsAuthenticated, "Response": Response}

display = run(SPECIFICATION, "Example 1: Get Accurate Tokens in Any View", **_rest)["my_view"]
operation = run(SPECIFICATION, "Example 2: Validate AI Access Before Operation")["my_ai_operation"]
GatedView = run(SPECIFICATION, "Example 3: Use Decorator on API View", **_rest, my_ai_service=_Service())["MyAIAPIView"]


DecoratedView = run(SPECIFICATION, '`@require_ai_tokens(estimated_tokens=1500, feature_name="AI Feature")`', **_rest)[
    "MyAIView"
]
task = run(SPECIFICATION, "`check_tokens_for_function(user, estimated_tokens, feature_name)`")["my_task"]


@api_view(["POST"])
@permission_classes([IsAuthenticated])
def solve(request: Request) -> Response:
    """Run the lines by which the specification presents its solution."""
    names = run(SPECIFICATION, "Solution Implemented", user=request.user)
    return Response([names["original_tokens"], names["consumed_tokens"], names["tokens_remaining"]])


@api_view(["POST"])
@permission_classes([IsAuthenticated])
def run_in_a_task(request: Request) -> Response:
    """Run the function that checks tokens outside of a view. It leaves both its branches to the reader."""
    return Response({"returned": task(request.user)})


@api_view(["POST"])
@permission_classes([IsAuthenticated])
def operate(request: Request) -> Response:
    """Run the second example's operation as a view would."""
    try:
        operation(request.user)
    except PermissionError as denied:
        raise PermissionDenied(str(denied)) from denied
    return Response({"result": "done"})


@api_view(["POST"])
@permission_classes([IsAuthenticated])
def subscribe(request: Request) -> Response:
    """Subscribe a new user in the request's transaction, and return what the gate would say before the commit."""
    user = get_user_model().objects.create(username=f"new from {request.get_host()}")
    trial = FullPlan.objects.create(name="Trial", tokens_included=2_000, duration_days=14)
    names = run(
        MANUAL, "In a transaction that creates the subscription", Subscription=Subscription, user=user, trial=trial
    )
    return Response(names["access"])


async def write_summary(*_: Any) -> str:
    return "short"


ManualRestView = run(MANUAL, "Django REST framework", summarize=_Service().generate)["SummaryView"]
manual_function = run(MANUAL, "Django", summarize=_Service().generate)["summary"]
manual_async = run(MANUAL, "Django, async", summarize=write_summary)["summary"]
manual_hold = run(MANUAL, "Holding tokens", provider=_Service())["summary"]
manual_stream = run(MANUAL, "Streaming from Django", model=model)["summary"]
manual_async_stream = run(MANUAL, "Streaming from Django, async", model=model)["summary"]
