"""Names that hosts give to what trueup looks for, and how near a name comes to them. Pure."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["integer", "uuid", "text", "boolean", "time", "json", "number", "other"]
Noun = Literal["user", "token_plan", "full_plan", "subscription", "usage_log", "token_usage", "payment"]

ID: frozenset[Kind] = frozenset(("integer", "uuid", "text"))
INTEGER: frozenset[Kind] = frozenset(("integer",))
NUMBER: frozenset[Kind] = frozenset(("integer", "number"))
TEXT: frozenset[Kind] = frozenset(("text",))
TIME: frozenset[Kind] = frozenset(("time",))
FLAG: frozenset[Kind] = frozenset(("boolean",))


@dataclass(frozen=True, kw_only=True)
class Field:
    """A column that a mapping names: which kinds of type it may have, and other names for it, the likeliest first.

    `required`: nothing works without it; else `use` says what does not.
    """

    kinds: frozenset[Kind]
    names: tuple[str, ...] = ()
    required: bool = False
    use: str = ""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _field(kinds: frozenset[Kind], names: str = "", *, required: bool = False, use: str = "") -> Field:
    return Field(kinds=kinds, names=_words(names), required=required, use=use)


_VIEWS = "the account and plan views"
_CHARGE = "adding rows to the usage log (`trueup db init`)"
_SETUP = "`trueup db init`"
_USERS = "user owner_id owner customer_id customer account_id account member_id tenant_id created_by_id uid"
_PLAN = "plan_id plan package_id package tier_id tier product_id pack_id price_id"

FIELDS: dict[Noun, dict[str, Field]] = {
    "user": {
        "id": _field(ID, required=True),
        "username": _field(TEXT, "user_name login handle name display_name nickname full_name slug", use=_VIEWS),
        "email": _field(TEXT, "email_address e_mail mail", use=_VIEWS),
    },
    "token_plan": {
        "id": _field(ID, required=True),
        "name": _field(TEXT, "title label display_name slug code", use=_VIEWS),
        "tokens_included": _field(
            INTEGER,
            "included_tokens tokens token_count tokens_count token_amount token_limit tokens_limit token_quota "
            "tokens_per_month monthly_tokens credits_included credits credit_amount quota allowance amount",
            required=True,
        ),
        "is_active": _field(FLAG, "active enabled is_enabled available is_available published is_public", use=_VIEWS),
    },
    "full_plan": {
        "duration_days": _field(
            INTEGER,
            "days period_days length_days validity_days valid_days interval_days duration",
            use="the account and plan views, and payments",
        ),
    },
    "subscription": {
        "id": _field(ID, required=True),
        "user_id": _field(ID, _USERS, required=True),
        "token_plan_id": _field(ID, f"token_plan token_pack_id token_package_id pack {_PLAN}", required=True),
        "full_plan_id": _field(ID, f"full_plan subscription_plan_id subscription_plan {_PLAN}", required=True),
        "start_date": _field(
            TIME,
            "started_at starts_at start_at start started current_period_start period_start valid_from begins_at "
            "activated_at window_start renewed_at created_at",
            required=True,
        ),
        "end_date": _field(
            TIME,
            "ended_at ends_at end_at end current_period_end period_end valid_until valid_to expires_at expires expiry "
            "expiry_date expiration_date expired_at",
            required=True,
        ),
        "tokens_remaining": _field(
            INTEGER,
            "remaining_tokens tokens_left token_balance tokens_balance balance credits_remaining remaining_credits "
            "credits_left credit_balance available_tokens tokens_available quota_left remaining tokens credits quota",
            required=True,
        ),
        "is_active": _field(FLAG, "active enabled is_enabled is_valid", required=True),
    },
    "usage_log": {
        "id": _field(ID, required=True),
        "user_id": _field(ID, _USERS, required=True),
        "section": _field(
            TEXT,
            "feature feature_name category kind purpose source module task_type operation endpoint type",
            use=_CHARGE,
        ),
        "prompt_tokens": _field(
            INTEGER, "input_tokens tokens_in tokens_prompt request_tokens tokens_input", use=_CHARGE
        ),
        "completion_tokens": _field(
            INTEGER, "output_tokens tokens_out tokens_completion response_tokens generated_tokens", use=_CHARGE
        ),
        "total_tokens": _field(
            INTEGER,
            "tokens_total tokens token_count tokens_used used_tokens tokens_consumed total amount",
            required=True,
        ),
        "response_time_ms": _field(
            NUMBER, "latency_ms duration_ms elapsed_ms response_ms took_ms latency", use=_CHARGE
        ),
        "success": _field(FLAG, "succeeded is_success successful is_successful was_successful ok is_ok", required=True),
        "model_name": _field(TEXT, "model llm_model model_id engine ai_model", use=_CHARGE),
        "error_message": _field(
            TEXT, "error error_text failure_reason exception", use="keeping errors of failed calls"
        ),
        "metadata": _field(frozenset(("json",)), "meta extra details data context payload attributes", use=_CHARGE),
        "created_at": _field(
            TIME,
            "logged_at used_at called_at occurred_at requested_at timestamp time ts at created date_created "
            "inserted_at event_time happened_at",
            required=True,
        ),
    },
    "token_usage": {
        "id": _field(ID, required=True),
        "subscription_id": _field(ID, "subscription user_subscription_id membership_id", required=True),
        "used_tokens": _field(
            INTEGER, "tokens_used tokens amount tokens_deducted deducted_tokens deducted quantity", required=True
        ),
        "usage_date": _field(
            TIME, "used_at created_at deducted_at occurred_at timestamp date at created logged_at", required=True
        ),
        "description": _field(TEXT, "note notes reason comment memo", use="nothing yet"),
    },
    "payment": {
        "id": _field(ID, required=True),
        "user_id": _field(ID, _USERS, required=True),
        "subscription_id": _field(ID, "subscription user_subscription_id membership_id", use="nothing yet"),
        "token_plan_id": _field(ID, f"token_plan token_pack_id token_package_id pack {_PLAN}", required=True),
        "full_plan_id": _field(ID, f"full_plan subscription_plan_id subscription_plan {_PLAN}", required=True),
        "status": _field(TEXT, "state payment_status", required=True),
        "payment_date": _field(
            TIME, "paid_at completed_at purchased_at created_at date created timestamp", required=True
        ),
        "transaction_id": _field(
            ID,
            "reference external_id provider_id provider_ref payment_intent_id stripe_id charge_id invoice_id order_id",
            required=True,
        ),
    },
}
FIELDS["full_plan"] = {**FIELDS["token_plan"], **FIELDS["full_plan"]}

TABLES: dict[Noun, tuple[str, ...]] = {
    "user": _words("auth_user user users account accounts customer customers member members app_user profile"),
    "token_plan": _words(
        "token_plan token_plans token_pack token_packs token_package token_packages credit_pack credit_packs "
        "credit_package token_bundle pack packs package packages plan plans"
    ),
    "full_plan": _words(
        "full_plan full_plans subscription_plan subscription_plans pricing_plan plan plans tier tiers product"
    ),
    "subscription": _words(
        "subscription subscriptions user_subscription user_subscriptions membership memberships user_plan "
        "account_plan ai_subscription token_balance token_balances wallet wallets credit_balance ai_account "
        "entitlement"
    ),
    "usage_log": _words(
        "ai_usage_log ai_usage usage_log usage_logs ai_usage_logs llm_usage llm_call llm_calls llm_request "
        "llm_requests ai_call ai_calls ai_request ai_requests ai_log ai_logs token_log usage_event usage_events "
        "usage model_call model_calls completion completions inference_log generation generations api_usage"
    ),
    "token_usage": _words(
        "token_usage token_usages tokenusage token_deduction token_deductions deduction decrement decrements "
        "token_transaction token_transactions credit_transaction token_ledger counter_log"
    ),
    "payment": _words("payment payments purchase purchases order orders invoice invoices transaction"),
}

PAID_WORDS = ("completed", "complete", "succeeded", "success", "successful", "paid", "captured", "settled", "confirmed")
"""What hosts call a payment whose money has come; compared without case."""

ACTIVE_WORDS = ("active", "enabled")
"""What hosts call a subscription that is in force; compared without case."""
STATUS_OF_SUBSCRIPTION = frozenset(_words("status state subscription_status subscription_state"))
DELETED_NAMES = frozenset(_words("deleted_at deleted_on discarded_at removed_at"))
"""When a row was deleted that is still there."""

STATUS_NAMES = frozenset(_words("status state outcome result success ended finish_status call_status request_status"))
OK_WORDS = ("ok", "success", "successful", "succeeded", "completed", "complete", "done", "finished")
FAILED_WORDS = ("failed", "failure", "fail", "error", "errored")
"""What hosts call a call that did, or did not, what was asked; compared without case."""

_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_FUZZY = 0.86


def plain(name: str) -> str:
    """Return a name in lower case, its words joined by "_": tokensLeft and "Tokens Left" are tokens_left."""
    return re.sub(r"\W+", "_", _HUMPS.sub("_", name)).strip("_").lower()


def nearness(name: str, default: str, others: tuple[str, ...]) -> tuple[float, str]:
    """Return how near a name comes to what is looked for, 0 to 1, and why. 1: it is Django's default name."""
    if name == default:
        return 1.0, "Django's default name"
    mine, known = plain(name), (plain(default), *others)
    if mine == known[0] or mine.replace("_", "") == known[0].replace("_", ""):
        return 0.95, f"{default} in another spelling"
    # Names that stand further back in the list say less.
    for place, other in enumerate(others):
        if mine == other or mine.replace("_", "") == other.replace("_", ""):
            return max(0.9 - 0.015 * place, 0.6), f"another name for {default}"
    # Django puts the application's label before a model's name, whose words it joins: assistant_aiusage.
    words = mine.split("_")
    tails = {"".join(words[place:]) for place in range(1, len(words))}
    ends = [other for other in known if len(other) > 3 and other.replace("_", "") in tails]
    if ends:
        return 0.75, f"its name ends with {max(ends, key=len)}"
    holds = [other for other in known if len(other) > 3 and f"_{other}_" in f"_{mine}_"]
    if holds:
        return 0.6, f"its name holds {max(holds, key=len)}"
    close = difflib.get_close_matches(mine, known, n=1, cutoff=_FUZZY)
    return (0.55, f"its name is close to {close[0]}") if close else (0.0, "")
