"""The shop's API: `uvicorn api:app`. A real one would take the customer from a token."""

from typing import Annotated

import billing
from fastapi import Body, Depends, FastAPI, Header

import tasks
from trueup.billing.frameworks.fastapi import ai_tokens_required, answer_denials

app = FastAPI(title="Shop")
answer_denials(app)


def customer(x_customer: Annotated[str, Header()]) -> int | None:
    return billing.customer_named(x_customer)


@app.post("/summaries", dependencies=[Depends(ai_tokens_required(1_000, "Summaries", user=customer))])
def summarize(text: Annotated[str, Body(embed=True)], user: Annotated[int, Depends(customer)]) -> dict[str, str]:
    """Have a worker summarize the text. Without the tokens the answer is 402, with the reason."""
    return {"summary": tasks.summarize.delay(user_id=user, text=text).get(timeout=60)}
