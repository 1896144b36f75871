"""For Django projects. Importing this package imports neither Django nor anything of trueup's that is heavy."""

from trueup.django.driver import keep_psycopg2

__all__ = ["keep_psycopg2"]
