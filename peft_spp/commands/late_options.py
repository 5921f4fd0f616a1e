# SPDX-License-Identifier: Apache-2.0
"""Options that are no parameters of a command's function, made when its help or its arguments are wanted."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer
from typer.main import get_command


def option(name: str, kind: Any, default: Any = None, *, flag: str | None = None, **settings: Any) -> Parameter:
    """A parameter that Typer makes an option of. Without a flag, that is the name, with its underscores."""
    if kind is bool:
        default = bool(default)
    kind = kind if default is not None else kind | None
    annotation = Annotated[kind, typer.Option(flag or f"--{name}", **settings)]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def as_options(parameters: Iterable[Parameter]) -> list[Any]:
    """The options that Typer makes of parameters."""

    def function(**_: Any) -> None: ...

    signature = Signature(list(parameters))
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in signature.parameters.values()}
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return list(get_command(app).params)
