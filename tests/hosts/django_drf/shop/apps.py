from django.apps import AppConfig


class ShopConfig(AppConfig):
    """The project's billing. trueup's package has the name `billing`; the label is free, and it makes the tables'."""

    name = "tests.hosts.django_drf.shop"
    label = "billing"
