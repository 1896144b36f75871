"""The demo's tenants, with rows as a host application writes them."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import Barrier

from sqlalchemy import Connection, Engine, text

STARTER, PRO = 1, 2  # plans


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A shop, its subscription, and its used tokens. `plan` None: no subscription."""

    id: int
    name: str
    plan: int | None = STARTER
    used_tokens: int = 0
    active: bool = True
    ended: bool = False


KESTREL = Tenant(id=1, name="kestrel-outdoor", plan=PRO, used_tokens=41_250)
SEPIDEH = Tenant(id=2, name="sepideh-crafts", plan=PRO, used_tokens=8_900)
BAKER = Tenant(id=3, name="north-street-bakery", used_tokens=6_420)
FLORIST = Tenant(id=4, name="lale-flowers", used_tokens=2_310)
UNGUARDED = Tenant(id=5, name="without-the-gate", used_tokens=7_600)
GUARDED = Tenant(id=6, name="with-the-gate", used_tokens=7_600)

DENIED = {
    "no_subscription": Tenant(id=11, name="just-looking", plan=None),
    "subscription_deactivated": Tenant(id=12, name="closed-account", active=False),
    "subscription_expired": Tenant(id=13, name="last-years-trial", ended=True),
    "no_tokens_remaining": Tenant(id=14, name="used-it-all", used_tokens=10_000),
    "insufficient_tokens": Tenant(id=15, name="nearly-empty", used_tokens=9_700),
}
TENANTS = (KESTREL, SEPIDEH, BAKER, FLORIST, UNGUARDED, GUARDED, *DENIED.values())

_PLAN_TOKENS = {STARTER: 10_000, PRO: 100_000}
_PLAN_NAMES = {STARTER: "Starter", PRO: "Pro"}
_ROW_TOKENS = 430  # the tokens of one past call


def create_tenants(engine: Engine) -> None:
    """Fill the host's tables: plans, users, subscriptions with exact counters, and a log of past usage."""
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO public.billing_tokenplan (id, name, tokens_included) VALUES (:id, :name, :tokens)"),
            [{"id": plan, "name": name, "tokens": _PLAN_TOKENS[plan]} for plan, name in _PLAN_NAMES.items()],
        )
        for tenant in TENANTS:
            _create(connection, tenant)


def _create(connection: Connection, tenant: Tenant) -> None:
    now = datetime.now(UTC)
    connection.execute(
        text("INSERT INTO public.accounts_user (id, username, email) VALUES (:id, :name, :email)"),
        {"id": tenant.id, "name": tenant.name, "email": f"owner@{tenant.name}.example"},
    )
    if tenant.plan is None:
        return
    connection.execute(
        text(
            "INSERT INTO public.billing_subscription (id, user_id, token_plan_id, start_date, end_date, is_active, "
            "tokens_remaining) VALUES (:id, :id, :plan, :start, :end, :active, :counter)"
        ),
        {
            "id": tenant.id,
            "plan": tenant.plan,
            "start": now - timedelta(days=40 if tenant.ended else 12),
            "end": now + timedelta(days=-10 if tenant.ended else 18),
            "active": tenant.active,
            "counter": _PLAN_TOKENS[tenant.plan] - tenant.used_tokens,
        },
    )
    whole, rest = divmod(tenant.used_tokens, _ROW_TOKENS)
    sizes = [_ROW_TOKENS] * whole + [rest] * bool(rest)
    for place, tokens in enumerate(sizes):
        log_call(connection, tenant, tokens, now - timedelta(days=11, minutes=-90 * place))


def log_call(connection: Connection, tenant: Tenant, tokens: int, at: datetime) -> None:
    """Insert a log row by plain SQL, as a host does."""
    connection.execute(
        text(
            "INSERT INTO public.ai_usage_log "
            "(user_id, section, prompt_tokens, completion_tokens, total_tokens, model_name, created_at) "
            "VALUES (:user, 'chat', :prompt, :completion, :total, 'gpt-4o-mini', :at)"
        ),
        {"user": tenant.id, "prompt": tokens - tokens // 4, "completion": tokens // 4, "total": tokens, "at": at},
    )


def race_without_gate(engine: Engine, tenant: Tenant, tokens: int, workers: int) -> int:
    """Let workers spend at the same time as a host does: read the counter, call the model, log, subtract.

    Returns how many of them the counter admitted.
    """
    all_read = Barrier(workers)

    def work(_number: int) -> bool:
        with engine.connect() as connection:
            left = connection.execute(
                text("SELECT tokens_remaining FROM public.billing_subscription WHERE user_id = :user"),
                {"user": tenant.id},
            ).scalar_one()
        all_read.wait(timeout=30)
        if left < tokens:
            return False
        with engine.begin() as connection:
            log_call(connection, tenant, tokens, datetime.now(UTC))
            connection.execute(
                text(
                    "UPDATE public.billing_subscription SET tokens_remaining = greatest(:left - :tokens, 0) "
                    "WHERE user_id = :user"
                ),
                {"left": left, "tokens": tokens, "user": tenant.id},
            )
        return True

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(work, range(workers)))


def used_tokens(engine: Engine, tenant: Tenant) -> int:
    """Return the tokens of all of a tenant's calls in the log."""
    statement = text("SELECT coalesce(sum(total_tokens), 0) FROM public.ai_usage_log WHERE user_id = :user")
    with engine.connect() as connection:
        return int(connection.execute(statement, {"user": tenant.id}).scalar_one())


def plan_tokens(tenant: Tenant) -> int:
    """Return the tokens that a tenant's plan includes; 0 without a plan."""
    return 0 if tenant.plan is None else _PLAN_TOKENS[tenant.plan]


def miss_a_decrement(engine: Engine, tenant: Tenant, tokens: int) -> None:
    """Log a call and leave the counter, as a host whose second transaction fails silently."""
    with engine.begin() as connection:
        log_call(connection, tenant, tokens, datetime.now(UTC))


def decrement_twice(engine: Engine, tenant: Tenant, tokens: int) -> None:
    """Log a call once and lower the counter twice, as a host whose task is retried."""
    with engine.begin() as connection:
        log_call(connection, tenant, tokens, datetime.now(UTC))
        for _attempt in range(2):
            connection.execute(
                text(
                    "UPDATE public.billing_subscription SET tokens_remaining = tokens_remaining - :t "
                    "WHERE user_id = :user"
                ),
                {"t": tokens, "user": tenant.id},
            )


def counters(engine: Engine, *tenants: Tenant) -> dict[str, int]:
    """Return the host's counters of the tenants by name."""
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT user_id, tokens_remaining FROM public.billing_subscription WHERE user_id = ANY (:ids)"),
            {"ids": [tenant.id for tenant in tenants]},
        )
        shown = {row.user_id: row.tokens_remaining for row in rows}
    return {tenant.name: shown[tenant.id] for tenant in tenants}
