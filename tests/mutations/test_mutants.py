"""The mutation checks themselves: what is changed, and that the list of equivalent mutants stays true."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.mutations.__main__ import read_equivalents
from tests.mutations.mutant import InvalidMutantError, Mutant
from tests.mutations.python_mutants import python_functions
from tests.mutations.sql_mutants import SqlFunction, sql_functions

TAKE = """CREATE OR REPLACE FUNCTION public.take(p_user bigint, p_tokens bigint)
 RETURNS bigint LANGUAGE plpgsql
AS $function$
DECLARE v_left bigint;
BEGIN
    -- FOR UPDATE in a comment, and 'a < b' in a string, are left alone.
    PERFORM FROM purse WHERE id = p_user AND tokens >= p_tokens FOR UPDATE;
    IF NOT FOUND THEN
        RAISE 'a < b';
    END IF;
    UPDATE purse SET tokens = tokens - p_tokens
    WHERE id = p_user RETURNING coalesce(tokens, 0) INTO v_left;
    RETURN greatest(v_left, 0);
END $function$
"""


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE purse AS SELECT 1::bigint AS id, 50::bigint AS tokens"))
        connection.exec_driver_sql(TAKE)
    yield engine
    engine.dispose()


def made(engine: Engine) -> dict[tuple[str, str], Mutant]:
    return {(mutant.kind, mutant.now): mutant for mutant in SqlFunction("take", TAKE, engine).mutants()}


@pytest.mark.parametrize(
    ("kind", "now"),
    [
        ("lock", "PERFORM FROM purse WHERE id = p_user AND tokens >= p_tokens ;"),
        ("comparison", "PERFORM FROM purse WHERE id = p_user AND tokens > p_tokens FOR UPDATE;"),
        ("and-or", "PERFORM FROM purse WHERE id = p_user OR tokens >= p_tokens FOR UPDATE;"),
        ("condition", "PERFORM FROM purse WHERE true AND tokens >= p_tokens FOR UPDATE;"),
        ("condition", "PERFORM FROM purse WHERE id = p_user AND true FOR UPDATE;"),
        ("statement", "NULL;"),
        ("not", "IF FOUND THEN"),
        ("coalesce", "WHERE id = p_user RETURNING tokens INTO v_left;"),
        (
            "sum",
            "UPDATE purse SET tokens = tokens + p_tokens",
        ),
        (
            "value",
            "UPDATE purse SET tokens = purse.tokens",
        ),
        ("extreme", "RETURN least(v_left, 0);"),
        ("constant", "RETURN greatest(v_left, 1);"),
    ],
)
def test_each_kind_of_change_makes_a_mutant_that_postgresql_accepts(engine: Engine, kind: str, now: str) -> None:
    mutant = made(engine)[kind, now]
    mutant.function.install(mutant)


def test_comments_and_strings_are_left_alone(engine: Engine) -> None:
    assert all("FOR UPDATE in a comment, and 'a < b'" in mutant.code for mutant in made(engine).values())


def test_a_mutant_takes_the_functions_place_until_it_is_restored(engine: Engine) -> None:
    def take(tokens: int) -> int:
        with engine.begin() as connection:
            return int(connection.execute(text("SELECT take(1, :tokens)"), {"tokens": tokens}).scalar_one())

    mutant = made(engine)["extreme", "RETURN least(v_left, 0);"]
    mutant.function.install(mutant)
    assert take(10) == 0
    mutant.function.restore()
    assert take(10) == 30


def test_a_mutant_that_is_no_code_is_told_apart(engine: Engine) -> None:
    function = SqlFunction("take", TAKE, engine)
    with pytest.raises(InvalidMutantError):
        function.install(Mutant(function=function, kind="sum", was="", now="", code=TAKE.replace("greatest(", "((")))


def test_a_python_mutant_takes_the_functions_place_until_it_is_restored() -> None:
    from trueup.llm.output_cap import Demand

    [function] = [each for each in python_functions() if each.name == "trueup.llm.output_cap:Demand.limit"]
    mutant = next(each for each in function.mutants() if "tokens + self.cost(0)" in each.now)
    function.install(mutant)
    mutated = Demand(prompt_tokens=10).limit(100)
    function.restore()
    assert (mutated, Demand(prompt_tokens=10).limit(100)) == (110, 90)


def test_each_equivalent_mutant_is_one_of_the_code_as_it_is(database: str) -> None:
    engine = create_engine(database, poolclass=NullPool)
    functions = [*sql_functions(engine), *python_functions()]
    engine.dispose()
    keys = {mutant.key for function in functions for mutant in function.mutants()}
    outdated = [key for key in read_equivalents() if key not in keys]
    assert not outdated, f"delete or renew these entries of equivalents.toml: {outdated}"
