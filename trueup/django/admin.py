"""Django admin: holds, charges, runs, modes, and drifts with their story and the decisions of a person.

All pages only read, on the project's own connection. A decision goes through trueup, as `trueup drift accept` does.
"""

from datetime import timedelta
from typing import Any, ClassVar

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.functional import cached_property

from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.django.models import Charge, Drift, GateMode, Hold, ReconcileRun
from trueup.drift.causes import CERTAINTY_SENTENCES, cause_sentence, cause_title
from trueup.errors import TrueupError
from trueup.reports.user_report import report_counter
from trueup.review.decisions import Choice, decide_drift, list_reviews
from trueup.settings.settings import get_settings

# A count of millions of rows takes seconds, and people do not turn so many pages.
MOST_COUNTED = 10_000
RECENT = timedelta(days=1)
# A page of the list of drifts has at most this many, and one decision is about drifts of one page.
MOST_DECIDED = 100


class CappedPaginator(Paginator):
    """Pages of at most the first `MOST_COUNTED` rows."""

    @cached_property
    def count(self) -> int:
        """The number of rows, `MOST_COUNTED` if there are more."""
        found: int = self.object_list.order_by()[:MOST_COUNTED].count()
        return found


class ReadOnlyAdmin(admin.ModelAdmin):
    """A list that is fast with millions of rows, searched by the user's id."""

    paginator = CappedPaginator
    show_full_result_count = False
    list_per_page = MOST_DECIDED
    list_max_show_all = MOST_DECIDED
    list_select_related: Any = ("user",)
    search_fields: Any = ("user",)
    search_help_text = "A user's id."

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def unsearched(self, rows: QuerySet) -> QuerySet:
        """Return the rows to list without a search."""
        return rows

    def get_search_results(self, request: HttpRequest, queryset: QuerySet, search_term: str) -> tuple[QuerySet, bool]:
        """Find one user's rows through the keys, which begin with the user. No text is no user's row."""
        term = search_term.strip()
        if not term:
            return self.unsearched(queryset), False
        try:
            user = self.model._meta.get_field("user").target_field.to_python(term)
        except ValidationError:
            return queryset.none(), False
        return queryset.filter(user_id=user), False


@admin.register(Hold)
class HoldAdmin(ReadOnlyAdmin):
    list_display = (
        *("user", "feature_name", "status", "tokens_reserved", "tokens_charged", "calls"),
        *("opened_at", "expires_at", "closed_at", "task_id"),
    )
    list_display_links = None
    ordering = ("-opened_at",)
    search_help_text = "A user's id shows all holds of this user; otherwise the open ones are listed."

    def unsearched(self, rows: QuerySet) -> QuerySet:
        return rows.filter(status="open")


@admin.register(Charge)
class ChargeAdmin(ReadOnlyAdmin):
    list_display = ("user", "model_name", "section", "tokens_total", "late", "charged_at", "task_id", "log_id")
    list_display_links = None
    ordering = ("-charged_at",)
    search_help_text = "A user's id shows all charges of this user; otherwise those of the last day are listed."

    def unsearched(self, rows: QuerySet) -> QuerySet:
        return rows.filter(charged_at__gt=timezone.now() - RECENT)


@admin.register(ReconcileRun)
class ReconcileRunAdmin(ReadOnlyAdmin):
    list_display = (
        *("id", "kind", "dry_run", "status", "started_at", "finished_at", "checked", "drifted", "corrected"),
        *("in_review", "tokens_overstated", "tokens_understated"),
    )
    list_select_related = False
    search_fields = ()
    ordering = ("-id",)


@admin.register(GateMode)
class GateModeAdmin(ReadOnlyAdmin):
    list_display = ("feature_name", "mode")
    list_display_links = None
    list_select_related = False
    search_fields = ()
    ordering = ("feature_name",)


class DecisionForm(forms.Form):
    """A person's decision about a drift, or about one component of it."""

    choice = forms.ChoiceField(
        choices=(
            ("accept", "Accept: correct the counter"),
            ("grant", "Grant: give the user the tokens that the counter shows too much"),
            ("ignore", "Ignore: leave this difference as it is while it does not change"),
        ),
        widget=forms.RadioSelect,
    )
    component = forms.TypedChoiceField(
        coerce=int, empty_value=None, required=False, help_text="One cause alone; the others stay in review."
    )
    note = forms.CharField(max_length=500, help_text="Why. It is kept with the decision.")
    reference = forms.CharField(
        max_length=200, required=False, help_text="Of a grant: a payment's number, for example. Each grants once."
    )

    def __init__(self, *arguments: Any, components: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        named = [
            (number, f"{number}: {cause_title(one['cause'])} {one['tokens']:+,}")
            for number, one in enumerate(components, 1)
        ]
        self.fields["component"].choices = [("", "the whole drift"), *named]

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean()
        if cleaned.get("choice") == "grant" and not cleaned.get("reference"):
            self.add_error("reference", "A grant needs a reference.")
        return cleaned


class NoteForm(forms.Form):
    """Why several drifts are decided alike."""

    note = forms.CharField(max_length=500, help_text="Why. It is kept with each decision.")


@admin.register(Drift)
class DriftAdmin(ReadOnlyAdmin):
    list_display = (
        *("id", "user", "difference", "cause_name", "certainty", "action", "observed", "expected", "found_at"),
    )
    list_filter = ("action", "certainty")
    ordering = ("-id",)
    search_help_text = "A user's id shows all drifts of this user."
    fields = (
        *("id", "user", "run", "observed", "expected", "difference", "written", "cause_name", "certainty"),
        *("action", "reason", "found_at", "last_seen_at"),
    )
    actions: ClassVar[list[str]] = ["accept_selected", "ignore_selected"]

    @admin.display(description="tokens")
    def difference(self, drift: Drift) -> int | None:
        return None if drift.observed is None else drift.observed - drift.expected

    @admin.display(description="cause", ordering="cause")
    def cause_name(self, drift: Drift) -> str:
        return cause_title(drift.cause)

    def has_review_permission(self, request: HttpRequest) -> bool:
        """Return whether this person may decide: the permission `trueup.review_drift`."""
        allowed: bool = request.user.has_perm("trueup.review_drift")
        return allowed

    def get_urls(self) -> list[URLPattern]:
        decide = path("<int:number>/decide/", self.admin_site.admin_view(self.decide_view), name="trueup_drift_decide")
        return [decide, *super().get_urls()]

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the drift with its user's counter as trueup sees it now."""
        drift = self.get_object(request, object_id)
        context = dict(extra_context or {})
        if drift is not None and request.method == "GET" and self.has_view_permission(request, drift):
            try:
                context["story"] = _story(drift)
                context["decision"] = self._form(request, drift)
            except TrueupError as error:
                self.message_user(request, str(error), messages.ERROR)
        response: HttpResponse = super().change_view(request, object_id, form_url, context)
        return response

    def decide_view(self, request: HttpRequest, number: int) -> HttpResponse:
        """Make one decision, posted by the form of the drift's page."""
        drift = self.get_object(request, str(number))
        if drift is None or not self.has_review_permission(request) or request.method != "POST":
            raise PermissionDenied
        try:
            form = self._form(request, drift, request.POST)
        except TrueupError as error:
            self.message_user(request, str(error), messages.ERROR)
            return HttpResponseRedirect(reverse("admin:trueup_drift_change", args=(number,)))
        if form is None:
            self.message_user(
                request, f"Drift {number} is not in review any more. Nothing was written.", messages.ERROR
            )
        elif not form.is_valid():
            for name, errors in form.errors.items():
                self.message_user(request, f"{name}: {' '.join(errors)} Nothing was written.", messages.ERROR)
        else:
            given = form.cleaned_data
            component = given["component"]
            if self._decide(request, drift, given["choice"], given["note"], given["reference"] or None, component):
                return HttpResponseRedirect(reverse("admin:trueup_drift_changelist"))
        return HttpResponseRedirect(reverse("admin:trueup_drift_change", args=(number,)))

    @admin.action(permissions=["review"], description="Accept: correct the counters of these drifts")
    def accept_selected(self, request: HttpRequest, rows: QuerySet) -> HttpResponse | None:
        return self._decide_selected(request, rows, "accept")

    @admin.action(permissions=["review"], description="Ignore: leave these differences as they are")
    def ignore_selected(self, request: HttpRequest, rows: QuerySet) -> HttpResponse | None:
        return self._decide_selected(request, rows, "ignore")

    def _decide_selected(self, request: HttpRequest, rows: QuerySet, choice: Choice) -> HttpResponse | None:
        """Ask for a note first; then decide each drift that was selected by hand."""
        if request.POST.get("select_across") == "1":
            self.message_user(request, "Select drifts of one page. Nothing was written.", messages.ERROR)
            return None
        drifts = list(rows.filter(action="review")[:MOST_DECIDED])
        form = NoteForm(request.POST if "decide" in request.POST else None)
        if drifts and not form.is_valid():
            context = {
                **self.admin_site.each_context(request),
                "title": f"{choice.capitalize()} {len(drifts)} drifts",
                "drifts": drifts,
                "choice": choice,
                "form": form,
                "opts": self.opts,
            }
            return TemplateResponse(request, "admin/trueup/drift/decide_selected.html", context)
        for drift in drifts:
            self._decide(request, drift, choice, form.cleaned_data["note"])
        if not drifts:
            self.message_user(request, "None of these drifts is in review. Nothing was written.", messages.WARNING)
        return None

    def _decide(
        self,
        request: HttpRequest,
        drift: Drift,
        choice: Choice,
        note: str,
        reference: str | None = None,
        component: int | None = None,
    ) -> bool:
        """Decide by trueup, tell the person, and keep it in Django's own log. Returns whether it was decided."""
        try:
            retrying(
                lambda connection: decide_drift(
                    *(connection, drift.id, choice),
                    by=request.user.get_username(),
                    note=note,
                    reference=reference,
                    component=component,
                )
            )
        except TrueupError as error:
            self.message_user(request, str(error), messages.ERROR)
            return False
        self.log_change(request, drift, f"{choice}: {note}")
        self.message_user(request, f"Drift {drift.id}: {choice}.", messages.SUCCESS)
        return True

    def _form(self, request: HttpRequest, drift: Drift, data: Any = None) -> DecisionForm | None:
        """Return the form for a decision; None if the drift is not in review, or this person may not decide."""
        if drift.action != "review" or not self.has_review_permission(request):
            return None
        kind = get_settings().host.user_id_type
        items = retrying(lambda connection: list_reviews(connection, kind, user_id=drift.user_id))
        found = [item for item in items if item.id == drift.id]
        return DecisionForm(data, components=found[0].evidence.get("components", [])) if found else None


def _story(drift: Drift) -> dict[str, Any]:
    """Return the counter's present figures, the causes of its drift, and its changes, in sentences."""
    settings = get_settings()
    with connect() as connection:
        story = report_counter(connection, settings.host, drift.user_id, rules=settings.reconcile.rules())
    components = story.finding.explanation.components if story.finding else ()
    causes = [(f"{one.tokens:+,}", cause_sentence(one.cause), CERTAINTY_SENTENCES[one.certainty]) for one in components]
    return {
        "figures": [
            ("plan and grants", story.original),
            ("used, by the usage log", story.consumed),
            ("the counter should show", story.expected),
            ("the counter shows", story.observed),
        ],
        "causes": causes,
        "told": story.told,
        "decisions": story.decisions,
    }
