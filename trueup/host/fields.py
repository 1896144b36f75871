"""The registry of the host's tables and columns: each field once, with all facts about it.

A field is one entry: its default name (Django's), the settings that may replace the column, and a `FieldEntry`.
Discovery, the mapping, the checks of types and rights, the example tables and the trial rows read these entries.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from trueup.errors import InvalidInputError
from trueup.host.setting_values import (
    Active,
    Column,
    Compared,
    Count,
    Counts,
    Direction,
    Document,
    End,
    Flag,
    Keeper,
    PlanRule,
    PlanTokens,
    Recurring,
    Table,
    Unlimited,
    Value,
    Words,
    read_counter,
    read_plan_rule,
)

Noun = Literal["user", "token_plan", "full_plan", "subscription", "usage_log", "token_usage", "payment"]
NOUNS: tuple[Noun, ...] = get_args(Noun)

Kind = Literal["integer", "uuid", "text", "boolean", "time", "json", "number", "other"]
IdType = Literal["bigint", "uuid", "text"]

LOCAL_TIME = "timestamp without time zone"
_TYPES: dict[Kind, tuple[str, ...]] = {
    "integer": ("smallint", "integer", "bigint"),
    "text": ("text", "character varying", "character"),
    "time": ("timestamp with time zone", LOCAL_TIME),
    "number": ("numeric", "real", "double precision"),
    "uuid": ("uuid",),
    "boolean": ("boolean",),
    "json": ("jsonb",),
}
ID_TYPES: dict[Kind, IdType] = {"integer": "bigint", "uuid": "uuid", "text": "text"}
"""The mapping's name for the type of an id, by the kind of its column."""

ID: frozenset[Kind] = frozenset(ID_TYPES)
INTEGER: frozenset[Kind] = frozenset({"integer"})
NUMBER: frozenset[Kind] = frozenset({"integer", "number"})
TEXT: frozenset[Kind] = frozenset({"text"})
TIME: frozenset[Kind] = frozenset({"time"})
FLAG: frozenset[Kind] = frozenset({"boolean"})
JSON: frozenset[Kind] = frozenset({"json"})


def kind_of(type_name: str, labels: Sequence[str] = ()) -> Kind:
    """Return the kind of a column by its type, as `format_type` writes it. `labels`: the values of an enum."""
    return "text" if labels else next((kind for kind, types in _TYPES.items() if type_name in types), "other")


def types_of(kinds: Iterable[Kind]) -> tuple[str, ...]:
    """Return the PostgreSQL types of these kinds, as `format_type` writes them."""
    return tuple(one for kind in kinds for one in _TYPES[kind])


VIEWS = "the account and plan views"
_VIEWS_AND_PAYMENTS = f"{VIEWS}, and payments"
_CHARGE = "adding rows to the usage log (`trueup db init`)"
_NOTHING = "nothing yet"


@dataclass(frozen=True)
class FieldEntry:
    """The facts about a column.

    `kinds`: the kinds of type that it may have. `synonyms`: other names for it, separated by spaces, the likeliest
    first. `required`: trueup can't work without it. `use`: the feature that needs it, if it is not required, or the
    only reader. `spare`: the host may lack it even if the mapping names it. `references`: the table of its
    foreign key.

    `is_sought`: discovery looks for such a column by name. `substitute`: the constant that discovery proposes if the
    host lacks the column, because no decision depends on it. `otherwise`: settings that a person may give
    instead of a column, each with its condition.

    `written`: trueup's own rows in the log fill it. `counted`: it defines the usage, its user or its time.

    `length`, `nullable`, `unique`, `default` (SQL): the declaration in a typical Django host, for the example tables.
    """

    kinds: frozenset[Kind]
    synonyms: str = ""
    _: KW_ONLY
    required: bool = False
    use: str = ""
    spare: bool = False
    references: Noun | None = None
    is_sought: bool = True
    substitute: Any = None
    otherwise: tuple[tuple[Mapping[str, Any], str], ...] = ()
    written: bool = False
    counted: bool = False
    length: int | None = None
    nullable: bool = False
    unique: bool = False
    default: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The synonyms, the likeliest first."""
        return tuple(self.synonyms.split())

    @property
    def is_for_views(self) -> bool:
        """Whether only the views read it. (Payments also need a plan's duration.)"""
        return self.use in (VIEWS, _VIEWS_AND_PAYMENTS)

    @property
    def sql_type(self) -> str:
        """Its type in SQL if the host has no such column."""
        types = {TIME: "timestamptz", JSON: "jsonb", FLAG: "boolean", INTEGER: "integer"}
        return types.get(self.kinds, "text")


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """The facts about a table.

    `anchors`: the fields that discovery requires of it. `default_name`: Django's, if the mapping has none. `index`: the
    columns of the index for reads of a user's rows. `optional`: trueup works without it.
    """

    meaning: str
    synonyms: str
    anchors: tuple[str, ...]
    default_name: str
    index: tuple[str, str] | None = None
    optional: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The synonyms, the likeliest first."""
        return tuple(self.synonyms.split())


_USERS = "user owner_id owner customer_id customer account_id account member_id tenant_id created_by_id uid"
_PLAN = "plan_id plan package_id package tier_id tier product_id pack_id price_id"
_TOKEN_PLAN = f"token_plan token_pack_id token_package_id pack {_PLAN}"
_FULL_PLAN = f"full_plan subscription_plan_id subscription_plan {_PLAN}"
_SUBSCRIPTIONS = "subscription user_subscription_id membership_id"

_Id = Annotated[Column, FieldEntry(ID, required=True)]
_TokenPlanId = Annotated[Column, FieldEntry(ID, _TOKEN_PLAN, required=True, references="token_plan", nullable=True)]
_FullPlanId = Annotated[Column, FieldEntry(ID, _FULL_PLAN, required=True, references="full_plan", nullable=True)]


class Names(BaseModel):
    # Before 2.10, pydantic warns about each field whose name begins with "model_", unless this is empty.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    entry: ClassVar[TableEntry]


# Each field is a paragraph.
# fmt: off
class UserTable(Names):
    """Optional. `table` None: each user id with a subscription is a user, and the views show no names."""

    entry: ClassVar = TableEntry(
        meaning="the users",
        synonyms="auth_user user users account accounts customer customers member members app_user profile",
        anchors=("id",),
        default_name="accounts_user",
    )
    table: Table | None = "accounts_user"
    id: Annotated[Column, FieldEntry(ID, required=True, use=VIEWS)] = "id"
    username: Annotated[Words, FieldEntry(TEXT, "user_name login handle name display_name nickname full_name slug",
        use=VIEWS, substitute="", length=150, unique=True)] = "username"
    email: Annotated[Words, FieldEntry(TEXT, "email_address e_mail mail", use=VIEWS, substitute="",
        length=254)] = "email"


class TokenPlanTable(Names):
    """Optional. `table` None: the host has no such plans."""

    entry: ClassVar = TableEntry(
        meaning="plans of tokens without a duration",
        synonyms="token_plan token_plans token_pack token_packs token_package token_packages credit_pack credit_packs "
        "credit_package token_bundle pack packs package packages plan plans",
        anchors=("id", "tokens_included"),
        default_name="billing_tokenplan",
    )
    table: Table | None = "billing_tokenplan"
    id: _Id = "id"
    name: Annotated[Words, FieldEntry(TEXT, "title label display_name slug code", use=VIEWS, substitute="",
        length=100)] = "name"
    tokens_included: Annotated[Column, FieldEntry(INTEGER, "included_tokens tokens token_count tokens_count "
        "token_amount token_limit tokens_limit token_quota tokens_per_month monthly_tokens credits_included credits "
        "credit_amount quota allowance amount", required=True)] = "tokens_included"
    is_active: Annotated[Flag, FieldEntry(FLAG, "active enabled is_enabled available is_available published is_public",
        use=VIEWS, substitute=True, default="true")] = "is_active"


class FullPlanTable(TokenPlanTable):
    """Optional, as `TokenPlanTable`."""

    entry: ClassVar = TableEntry(
        meaning="plans of tokens with a duration",
        synonyms="full_plan full_plans subscription_plan subscription_plans pricing_plan plan plans tier tiers product",
        anchors=("id", "tokens_included"),
        default_name="billing_fullplan",
    )
    table: Table | None = "billing_fullplan"
    duration_days: Annotated[Count, FieldEntry(INTEGER, "days period_days length_days validity_days valid_days "
        "interval_days duration", use=_VIEWS_AND_PAYMENTS,
        otherwise=(({"value": 30}, "all plans last so long"),))] = "duration_days"


class SubscriptionTable(Names):
    """`tokens_included`: the tokens that the subscription includes. None: its plans state them.

    `plans`: how: "first" the token plan's, else the full plan's; "sum" both; None: not set, as "first".
    `counts`: "up" if the counter shows used tokens, "down" if it shows the tokens left; None: not set, as "down".
    `unlimited`: the values that mean no limit. `counter_kept_by`: "host" if
    a trigger of the host's lowers the counter for each log row, also for trueup's; None: not set, as "trueup".
    `period`: how periods repeat; None: a period lasts until the host moves the start.
    """

    entry: ClassVar = TableEntry(
        meaning="the subscriptions, with the counter",
        synonyms="subscription subscriptions user_subscription user_subscriptions membership memberships user_plan "
        "account_plan ai_subscription token_balance token_balances wallet wallets credit_balance ai_account "
        "entitlement",
        anchors=("user_id", "tokens_remaining", "start_date"),
        default_name="billing_subscription",
    )
    table: Table = "billing_subscription"
    id: _Id = "id"
    user_id: Annotated[Column, FieldEntry(ID, _USERS, required=True, references="user", unique=True)] = "user_id"
    token_plan_id: _TokenPlanId = "token_plan_id"
    full_plan_id: _FullPlanId = "full_plan_id"
    start_date: Annotated[Column, FieldEntry(TIME, "started_at starts_at start_at start started current_period_start "
        "period_start valid_from begins_at begins activated_at window_start renewed_at created_at",
        required=True)] = "start_date"
    end_date: Annotated[End, FieldEntry(TIME, "ended_at ends_at ends end_at end current_period_end period_end "
        "valid_until valid_to expires_at expires expiry expiry_date expiration_date expired_at", required=True,
        otherwise=(({"value": "infinity"}, "none ends"),), nullable=True)] = "end_date"
    tokens_remaining: Annotated[Column, FieldEntry(INTEGER, "remaining_tokens tokens_left token_balance tokens_balance "
        "balance credits_remaining remaining_credits credits_left credit_balance available_tokens tokens_available "
        "quota_left remaining tokens credits quota", required=True, nullable=True)] = "tokens_remaining"
    is_active: Annotated[Active, FieldEntry(FLAG, "active enabled is_enabled is_valid", required=True,
        otherwise=(({"column": "COLUMN", "equals": "VALUE"}, "a status says so"),
        ({"value": True}, "all subscriptions are")), default="true")] = "is_active"
    tokens_included: Annotated[PlanTokens, FieldEntry(INTEGER, is_sought=False, nullable=True)] = None
    plans: PlanRule = None
    counts: Direction = None
    unlimited: Unlimited = None
    counter_kept_by: Keeper = None
    period: Recurring = None

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, given: Any) -> Any:
        return read_plan_rule(read_counter(given)) if isinstance(given, dict) else given


class UsageLogTable(Names):
    """`counts`: the condition for rows that count. None: `success`. With it, `success` has no default column.

    `record`: "host" if the host writes the rows of trueup's calls too, so that trueup writes none; None: "trueup".
    `section_type`: the enum of the section's column; None: it is text.
    """

    entry: ClassVar = TableEntry(
        meaning="the AI usage log",
        synonyms="ai_usage_log ai_usage usage_log usage_logs ai_usage_logs llm_usage llm_call llm_calls llm_request "
        "llm_requests ai_call ai_calls ai_request ai_requests ai_log ai_logs token_log usage_event usage_events "
        "usage model_call model_calls completion completions inference_log generation generations api_usage",
        anchors=("user_id", "total_tokens", "created_at"),
        default_name="ai_usage_log",
        index=("user_id", "created_at"),
    )
    table: Table = "ai_usage_log"
    id: Annotated[Column, FieldEntry(ID, required=True, written=True, counted=True)] = "id"
    user_id: Annotated[Column, FieldEntry(ID, _USERS, required=True, references="user", written=True,
        counted=True)] = "user_id"
    section: Annotated[Words, FieldEntry(TEXT, "feature feature_name category kind purpose source module task_type "
        "operation endpoint type", use=_CHARGE, substitute="other", written=True, length=50)] = "section"
    prompt_tokens: Annotated[Count, FieldEntry(INTEGER, "input_tokens tokens_in tokens_prompt request_tokens "
        "tokens_input", use=_CHARGE, substitute=0, written=True, default="0")] = "prompt_tokens"
    completion_tokens: Annotated[Count, FieldEntry(INTEGER, "output_tokens tokens_out tokens_completion "
        "response_tokens generated_tokens", use=_CHARGE, substitute=0, written=True, default="0")] = "completion_tokens"
    total_tokens: Annotated[Column, FieldEntry(INTEGER, "tokens_total tokens token_count tokens_used used_tokens "
        "tokens_consumed total amount", required=True, written=True, counted=True, default="0")] = "total_tokens"
    response_time_ms: Annotated[Count, FieldEntry(NUMBER, "latency_ms duration_ms elapsed_ms response_ms took_ms "
        "latency", use=_CHARGE, substitute=0, written=True, default="0")] = "response_time_ms"
    success: Annotated[Flag, FieldEntry(FLAG, "succeeded is_success successful is_successful was_successful ok is_ok",
        required=True, otherwise=(({"value": True}, "all rows count"),), written=True, counted=True,
        default="true")] = "success"
    model_name: Annotated[Words, FieldEntry(TEXT, "model llm_model model_id engine ai_model", use=_CHARGE,
        substitute="", written=True, length=100, default="''")] = "model_name"
    error_message: Annotated[Column, FieldEntry(TEXT, "error error_text failure_reason exception",
        use="keeping errors of failed calls", spare=True, nullable=True)] = "error_message"
    metadata: Annotated[Document, FieldEntry(JSON, "meta extra details data context payload attributes", use=_CHARGE,
        substitute={}, written=True, default="'{}'")] = "metadata"
    created_at: Annotated[Column, FieldEntry(TIME, "logged_at used_at called_at occurred_at requested_at timestamp "
        "time ts at created date_created inserted_at event_time happened_at", required=True, written=True, counted=True,
        default="now()")] = "created_at"
    counts: Annotated[Counts, FieldEntry(FLAG, is_sought=False, counted=True)] = None
    record: Keeper = None
    section_type: Table | None = None

    @model_validator(mode="before")
    @classmethod
    def _success_is_not_needed(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("counts") is not None and "success" not in given:
            return given | {"success": {"value": True}}
        return given

    @property
    def written(self) -> list[str]:
        """The columns that trueup's rows fill, in order."""
        compared = [self.counts.column] if isinstance(self.counts, Compared) else []
        return [*(getattr(self, field) for field in self.written_fields), *compared]

    @property
    def written_fields(self) -> list[str]:
        """The fields of these columns, without the last column if `counts` compares it with a value."""
        compared = self.counts.column if isinstance(self.counts, Compared) else None
        names = {field: getattr(self, field) for field, entry in FIELDS["usage_log"].items() if entry.written}
        return [field for field, name in names.items() if isinstance(name, str) and name != compared]

    @property
    def records_failure(self) -> bool:
        """Whether a row can record that its call failed. If not, failed calls get no row."""
        if isinstance(self.counts, Compared):
            return self.counts.failed is not None
        return isinstance(self.success, str)


class TokenUsageTable(Names):
    """Optional: one row for each decrement of the counter. `table` None: the host has no such rows."""

    entry: ClassVar = TableEntry(
        meaning="one row for each decrement of the counter",
        synonyms="token_usage token_usages tokenusage token_deduction token_deductions deduction decrement decrements "
        "token_transaction token_transactions credit_transaction token_ledger counter_log",
        anchors=("subscription_id", "used_tokens", "usage_date"),
        default_name="billing_tokenusage",
        index=("subscription_id", "usage_date"),
        optional=True,
    )
    table: Table | None = None
    id: _Id = "id"
    subscription_id: Annotated[Column, FieldEntry(ID, _SUBSCRIPTIONS, required=True,
        references="subscription")] = "subscription_id"
    used_tokens: Annotated[Column, FieldEntry(INTEGER, "tokens_used tokens amount tokens_deducted deducted_tokens "
        "deducted quantity", required=True)] = "used_tokens"
    usage_date: Annotated[Column, FieldEntry(TIME, "used_at created_at deducted_at occurred_at timestamp date at "
        "created logged_at", required=True, default="now()")] = "usage_date"
    description: Annotated[Column, FieldEntry(TEXT, "note notes reason comment memo",
        use="nothing but the description of stale writes", spare=True, length=255, default="''")] = "description"


class PaymentTable(Names):
    """Optional: purchases. `table` None: the host has no such rows.

    `completed_status`: the value of `status` for a completed payment.
    """

    entry: ClassVar = TableEntry(
        meaning="the payments",
        synonyms="payment payments purchase purchases order orders invoice invoices transaction",
        anchors=("user_id", "status", "payment_date"),
        default_name="billing_payment",
        index=("user_id", "payment_date"),
        optional=True,
    )
    table: Table | None = None
    id: _Id = "id"
    user_id: Annotated[Column, FieldEntry(ID, _USERS, required=True, references="user")] = "user_id"
    subscription_id: Annotated[Column, FieldEntry(ID, _SUBSCRIPTIONS, use=_NOTHING, spare=True,
        references="subscription", nullable=True)] = "subscription_id"
    token_plan_id: _TokenPlanId = "token_plan_id"
    full_plan_id: _FullPlanId = "full_plan_id"
    status: Annotated[Column, FieldEntry(TEXT, "state payment_status", required=True, length=20)] = "status"
    payment_date: Annotated[Column, FieldEntry(TIME, "paid_at completed_at purchased_at created_at date created "
        "timestamp", required=True, default="now()")] = "payment_date"
    transaction_id: Annotated[Column, FieldEntry(ID, "reference external_id provider_id provider_ref payment_intent_id "
        "stripe_id charge_id invoice_id order_id", required=True, length=100, nullable=True)] = "transaction_id"
    completed_status: Value = "completed"


# fmt: on


TABLES: dict[Noun, type[Names]] = {
    "user": UserTable,
    "token_plan": TokenPlanTable,
    "full_plan": FullPlanTable,
    "subscription": SubscriptionTable,
    "usage_log": UsageLogTable,
    "token_usage": TokenUsageTable,
    "payment": PaymentTable,
}


def _entries(table: type[Names]) -> Iterator[tuple[str, FieldEntry]]:
    for name, field in table.model_fields.items():
        for entry in field.metadata:
            if isinstance(entry, FieldEntry):
                yield name, entry


FIELDS: dict[Noun, dict[str, FieldEntry]] = {noun: dict(_entries(table)) for noun, table in TABLES.items()}
"""Each table's columns, in the order of the mapping."""


def settings_of(noun: Noun) -> frozenset[str]:
    """Return the settings of a table that are no columns, without the table's name."""
    return frozenset(TABLES[noun].model_fields) - FIELDS[noun].keys() - {"table"}


_SECTIONS = (
    "chat prompt_generation marketing_workflow knowledge_qa product_recommendation rag_pipeline web_knowledge "
    "session_memory intent_detection embedding_generation other"
)
SECTIONS = frozenset(_SECTIONS.split())
"""The sections of trueup's own features, from the specification of the host's schema. A host may have others."""


MAX_SECTION = 255


def check_section(section: object) -> str:
    """Return the section, any text. The host's log decides at the gate whether it takes it (`trueup.host.sections`).

    Raises `InvalidInputError` for an empty or overlong text.
    """
    if not isinstance(section, str) or not section or "\x00" in section or len(section) > MAX_SECTION:
        raise InvalidInputError(
            f"section: {section!r:.80} is no section. Give a text of 1 to {MAX_SECTION} characters."
        )
    return section
