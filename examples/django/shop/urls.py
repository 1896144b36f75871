from api.views import summarize
from django.urls import path

urlpatterns = [path("summaries/", summarize)]
