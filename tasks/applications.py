"""The Celery application that a metered task belongs to, in every thread of the host's process.

Celery's `shared_task` asks for the current application. `Celery(…)` makes itself current only in the thread that makes
it. In any other thread, without `app.set_default()`, Celery makes up an application with a default AMQP broker.
"""

import weakref

from celery import Celery, _state

from trueup.errors import SettingsError

_guests: "weakref.WeakSet[Celery]" = weakref.WeakSet()


def mark_as_guest(app: Celery) -> None:
    """Never take this application for the host's: it is trueup's own."""
    _guests.add(app)


def find_application() -> Celery:
    """Return the thread's current application, else the default application, else the only one of the host's.

    If the host has none or several, Celery makes up an application: its tasks can be called and not sent.
    """
    current: Celery | None = _state._tls.current_app or _state.default_app
    if current is not None and not is_made_up(current):
        return current
    hosts = _host_applications()
    application: Celery = hosts[0] if len(hosts) == 1 else _state.get_current_app()
    return application


def require_broker(app: Celery, task_name: str) -> None:
    """Raise `SettingsError` if the application was made up by Celery: it has no broker to send the task to."""
    if is_made_up(app):
        names = ", ".join(sorted(repr(host.main) for host in _host_applications()))
        known = f"several are known here: {names}" if names else "none is known here"
        raise SettingsError(
            f"Metered task {task_name} was not sent: this thread has no current Celery application, and {known}. Call "
            f"app.set_default() where your application is made, or send it by app.tasks[{task_name!r}]."
        )


def is_made_up(app: Celery) -> bool:
    """Return whether Celery made this application because it knew none, and nothing has configured it."""
    return app.main == "default" and not app.set_as_current and not app.conf.broker_url


def _host_applications() -> list[Celery]:
    return [app for app in list(_state._get_active_apps()) if app not in _guests and not is_made_up(app)]
