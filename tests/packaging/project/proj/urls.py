from billing.views import ClassView
from django.urls import path

urlpatterns = [path("gated", ClassView.as_view())]
