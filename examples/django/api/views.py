from django.http import HttpRequest, JsonResponse
from tasks.summaries import summarize as task

from trueup.billing.decorators import require_ai_tokens


@require_ai_tokens(estimated_tokens=1_000, feature_name="Summaries")
def summarize(request: HttpRequest) -> JsonResponse:
    """Send the task, unless the user lacks the tokens: then the answer is 402 with the reason."""
    sent = task.delay(user_id=request.user.pk, text=request.POST["text"])
    return JsonResponse({"task": sent.id}, status=202)
