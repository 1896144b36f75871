"""Runs whose jobs become processes: their sessions are told apart, and the others wait until one is at work."""

from typing import Any

from sqlalchemy import Engine, event

from tests.support.host import Host
from trueup.database.engine import create_trueup_engine
from trueup.settings.settings import Settings

PROCESS = "process"


def marked_engine(settings: Settings) -> Engine:
    """Make the engine of a process, with sessions that go by another name."""
    engine = create_trueup_engine(settings)

    @event.listens_for(engine, "connect")
    def mark(connection: Any, record: Any) -> None:
        connection.execute(f"SET application_name = '{PROCESS}'")
        connection.commit()

    return engine


def meet_processes(host: Host, then: str = "NULL") -> None:
    """Let all but the first two drifts wait until a process has written one, for two seconds at most.

    `then`: a statement of PL/pgSQL that a process's drifts meet first.
    """
    host.execute("CREATE SEQUENCE public.place")
    host.execute("CREATE TABLE public.by_process (user_id bigint)")
    host.execute(
        "CREATE FUNCTION public.meet() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF current_setting('application_name') = '{PROCESS}' THEN "
        f"{then}; INSERT INTO public.by_process VALUES (NEW.user_id); RETURN NEW; END IF; "
        "IF nextval('public.place') > 2 THEN FOR i IN 1..200 LOOP "
        "EXIT WHEN EXISTS (SELECT FROM public.by_process); PERFORM pg_sleep(0.01); END LOOP; END IF; "
        "RETURN NEW; END $$"
    )
    host.execute("CREATE TRIGGER meet BEFORE INSERT ON trueup.drift FOR EACH ROW EXECUTE FUNCTION public.meet()")
