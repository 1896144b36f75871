"""The shop's metered task. It runs only if its user has the tokens."""

import trueup


@trueup.metered_task(name="tasks.summarize", feature_name="Summaries", section="chat", estimated_tokens=1_000)
def summarize(model: trueup.Model, user_id: int, text: str) -> str:
    """Summarize a text for a user. Returns the summary."""
    question = trueup.Message(role="user", content=f"Summarize in one sentence:\n{text}")
    return model.complete([question], max_completion_tokens=200).text
