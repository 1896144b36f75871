"""Views of every kind that Django and REST framework have, each behind one of the decorators."""

from django.contrib.auth import authenticate, login
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils.decorators import method_decorator
from django.views import View
from rest_framework.decorators import api_view
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.viewsets import ViewSet

from .decorators import ai_tokens, require_active_subscription, require_ai_tokens
from .models import TokenPlan
from .utils import get_accurate_tokens_remaining

needs_tokens = require_ai_tokens(estimated_tokens=1500, feature_name="My Feature")


class ClassView(APIView):
    """As the specification shows it."""

    permission_classes = (IsAuthenticated,)

    @needs_tokens
    def post(self, request: Request) -> Response:
        return Response({"user": request.user.pk})


class OpenView(APIView):
    """Without a permission class: the decorator alone refuses anonymous users."""

    @needs_tokens
    def post(self, request: Request) -> Response:
        return Response({"user": request.user.pk})


@method_decorator(needs_tokens, name="post")
class MethodDecoratorView(APIView):
    def post(self, request: Request) -> Response:
        return Response({"user": request.user.pk})


class Summaries(ViewSet):
    @needs_tokens
    def create(self, request: Request) -> Response:
        return Response({"user": request.user.pk})


@api_view(["POST"])
@needs_tokens
def rest_function(request: Request) -> Response:
    return Response({"user": request.user.pk})


@api_view(["POST"])
@require_active_subscription
def subscribers_only(request: Request) -> Response:
    return Response({"user": request.user.pk})


@needs_tokens
def function(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"user": request.user.pk})


@needs_tokens
async def async_function(request: HttpRequest) -> JsonResponse:
    user = await request.auser()
    return JsonResponse({"user": user.pk})


class DjangoView(View):
    @needs_tokens
    def post(self, request: HttpRequest) -> JsonResponse:
        return JsonResponse({"user": request.user.pk})


class AsyncDjangoView(View):
    @needs_tokens
    async def post(self, request: HttpRequest) -> JsonResponse:
        user = await request.auser()
        return JsonResponse({"user": user.pk})


@api_view(["POST"])
@require_ai_tokens(estimated_tokens=1000, feature_name="Spending")
def spend(request: Request) -> Response:
    with ai_tokens(request.user, 1000, "Spending", "chat", key=request.headers.get("Idempotency-Key")) as hold:
        hold.charge(prompt_tokens=600, completion_tokens=400, model_name="m")
    return Response({"tokens_left": hold.tokens_left})


@api_view(["POST"])
@require_active_subscription
def write_then_hold(request: Request) -> Response:
    """Write to the database, and only then request more tokens than any budget has."""
    TokenPlan.objects.create(name="half a purchase", tokens_included=1)
    with ai_tokens(request.user, 10**12):
        return Response()


@api_view(["GET"])
def counts(request: Request) -> Response:
    return Response(get_accurate_tokens_remaining(request.user))


def log_in(request: HttpRequest) -> HttpResponse:
    """Start a session, as Django's own views have it."""
    user = authenticate(request, username=request.POST["username"], password=request.POST["password"])
    login(request, user)
    return HttpResponse()
