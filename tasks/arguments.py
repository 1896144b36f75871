"""Task arguments: parsed by the type hints of the body's own signature, before the gate."""

import inspect
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from trueup.accounts.user_ids import parse_user_id
from trueup.errors import InvalidInputError
from trueup.settings.settings import get_settings
from trueup.tasks.body import name_of, resolved_hint, signature_of

USER_ARGUMENT = "user_id"


class ArgumentParser:
    """Parses the arguments of one task body.

    `given`: count of first parameters that the caller does not pass, such as the model client. Their type hints are
    not used. Raises TypeError for a body that has no parameter `user_id`, that takes `*args` or `**kwargs`, or that has
    a type hint which can't be resolved.
    """

    def __init__(self, body: Callable[..., Any], *, given: int) -> None:
        parameters = list(signature_of(body).parameters.values())[given:]
        if USER_ARGUMENT not in [parameter.name for parameter in parameters]:
            raise TypeError(f"{name_of(body)} must take `{USER_ARGUMENT}`, the user whose tokens it spends")
        self.signature = inspect.Signature(parameters)
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._model = _arguments_model(body, parameters)

    def signature_with_task(self) -> inspect.Signature:
        """Return the signature that Celery checks calls against: the bound task, then the caller's parameters."""
        task = inspect.Parameter("_metered_task", inspect.Parameter.POSITIONAL_ONLY)
        return self.signature.replace(parameters=[task, *self.signature.parameters.values()])

    def parse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, converted to the types of the signature.

        Raises `InvalidInputError` for a missing, unknown or malformed argument.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidInputError(f"arguments: {error}") from None
        try:
            parsed = self._model(**bound.arguments)
        except ValidationError as error:
            raise InvalidInputError("; ".join(_describe(fault) for fault in error.errors())) from None
        arguments = {name: getattr(parsed, name) for name in self.signature.parameters}
        arguments[USER_ARGUMENT] = parse_user_id(arguments[USER_ARGUMENT], get_settings().host.user_id_type)
        return arguments


def _arguments_model(body: Callable[..., Any], parameters: list[inspect.Parameter]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{name_of(body)} takes `{parameter}`: name each argument instead")
        default = ... if parameter.default is parameter.empty else parameter.default
        hint = Any if parameter.name == USER_ARGUMENT else resolved_hint(body, parameter)
        fields[parameter.name] = (hint, default)
    config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(f"{name_of(body)}_arguments", __config__=config, **fields)


def _describe(fault: Any) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    return f"{name}: {fault['msg']}"
