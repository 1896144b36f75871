from django.apps import AppConfig


class AccountsConfig(AppConfig):
    name = "tests.hosts.django_drf.accounts"
    label = "accounts"
