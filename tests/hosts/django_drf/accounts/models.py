from django.contrib.auth.models import AbstractUser


class User(AbstractUser):
    """The project's own user, in Django's default table: accounts_user."""
