"""The shop's Celery application: its metered task, and trueup's upkeep."""

import os

from celery import Celery

import trueup

app = Celery("shop", broker=os.environ["TRUEUP_BROKER_URL"], backend=os.environ["TRUEUP_BROKER_URL"])
app.set_default()
trueup.add_upkeep(app)


@trueup.metered_task(name="tasks.summarize", feature_name="Summaries", section="other", estimated_tokens=1_000)
def summarize(model: trueup.Model, user_id: int, text: str) -> str:
    """Summarize a text for a customer. Returns the summary."""
    question = trueup.Message(role="user", content=f"Summarize in one sentence:\n{text}")
    return model.complete([question], max_completion_tokens=200).text
