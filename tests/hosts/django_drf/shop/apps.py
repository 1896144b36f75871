from django.apps import AppConfig


class ShopConfig(AppConfig):
    """The project's billing. trueup once had the name `billing`; the label is free, and it makes the tables'."""

    name = "tests.hosts.django_drf.shop"
    label = "billing"
