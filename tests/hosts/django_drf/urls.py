from billing import views
from django.db.transaction import non_atomic_requests
from django.urls import path
from rest_framework.decorators import api_view
from rest_framework_simplejwt.views import TokenObtainPairView

from . import examples

urlpatterns = [
    path("api/token/", TokenObtainPairView.as_view()),
    path("login", views.log_in),
    path("counts", views.counts),
    path("rest/class", views.ClassView.as_view()),
    path("rest/open", views.OpenView.as_view()),
    path("rest/method-decorator", views.MethodDecoratorView.as_view()),
    path("rest/viewset", views.Summaries.as_view({"post": "create"})),
    path("rest/function", views.rest_function),
    path("rest/subscribers", views.subscribers_only),
    path("django/function", views.function),
    path("django/class", views.DjangoView.as_view()),
    path("django/async-function", non_atomic_requests(views.async_function)),
    path("django/async-class", non_atomic_requests(views.AsyncDjangoView.as_view())),
    path("spend", views.spend),
    path("write-then-hold", views.write_then_hold),
    path("specification/1", api_view(["GET"])(examples.display)),
    path("specification/2", examples.operate),
    path("specification/3", examples.GatedView.as_view()),
    path("specification/solution", examples.solve),
    path("specification/decorator", examples.DecoratedView.as_view()),
    path("specification/function", examples.run_in_a_task),
    path("manual/rest", examples.ManualRestView.as_view()),
    path("manual/subscribe", examples.subscribe),
    path("manual/function", examples.manual_function),
    path("manual/async", non_atomic_requests(examples.manual_async)),
    path("manual/hold", examples.manual_hold),
    path("manual/stream", examples.manual_stream),
    path("manual/async-stream", non_atomic_requests(examples.manual_async_stream)),
]
