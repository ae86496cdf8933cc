"""What a setting such as method.objective may be: a name, or "name(setting=value, …)"; and none without a value."""

import ast
import difflib
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from shards.cli import wrong_value
from shards.errors import UserError

T = TypeVar("T")


def split_call(setting: str, text: str, example: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of "name(setting=value, …)"; values are Python literals.

    Args:
        setting: what the text belongs to, such as method.objective; errors name it.
        text: what was given.
        example: what errors show, such as "gradual or gradual(scale=0.5)".

    Raises:
        UserError: it is not written so.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
        if call.args or len(given) < len(call.keywords):  # one without a name, or one name twice
            raise ValueError
        return ast.unparse(call.func), given
    except (SyntaxError, ValueError):
        raise UserError(f"{setting}={text} is not understood; write it as {example}") from None


def unknown(setting: str, name: str, choices: Mapping[str, Any]) -> UserError:
    """Return the error for a name that is none of the choices."""
    near = difflib.get_close_matches(name, choices, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{setting}={name} is unknown; choose one of: {', '.join(choices)}{guess}")


def no_settings(setting: str, text: str, given: Mapping[str, Any]) -> None:
    """Refuse settings of what has none."""
    if given:
        raise UserError(f"{setting}={text}: this has no settings; leave them out, or choose another")


def check_given(parser: ArgumentParser, settings: Namespace) -> Namespace:
    """Return settings once each of them has a value: out of a file a parser takes null for any.

    Raises:
        UserError: a setting without a value that must have one, or a section without settings.
    """
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    sections = {key.partition(".")[0] for key in kinds if "." in key}
    for key, value in settings.items():
        if key in sections:
            raise UserError(f"the section {key} holds no settings; give it some, or leave its line out")
        if value is None and kinds.get(key) is not None and type(None) not in get_args(kinds[key]):
            raise UserError(f"{key} has no value; give it one, or leave its line out")
    return settings


def make_settings(setting: str, text: str, name: str, kind: type[T], given: dict[str, Any]) -> T:
    """Make a dataclass of settings from those that were given, each checked against its type.

    Raises:
        UserError: a setting that the dataclass does not have, or a value that it cannot have.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            has = f"its settings are: {', '.join(known)}" if known else "it has no settings"
            raise UserError(f"{setting}={text}: {name} has no setting {key!r}; {has}")
    section, parser = name.replace(".", "_"), ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, section)
    try:
        made: T = parser.instantiate(check_given(parser, parser.parse_object({section: given})))[section]
    except UserError as error:
        raise UserError(f"{setting}={text}: {error}") from None
    except (ArgumentError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        if wrong := wrong_value(said):
            said = f"{wrong[0].rpartition('.')[2]} {wrong[1]}"
        raise UserError(f"{setting}={text}: {said}") from None
    return made


def unusual(settings: Any, said: Collection[str] = ()) -> list[str]:
    """Return a dataclass's settings that are not its defaults, as titles say them, "gamma=5", but for those `said`."""
    found = {field.name: getattr(settings, field.name) for field in fields(settings)}
    usual = {field.name: field.default for field in fields(settings)}
    return [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in found.items()
        if name not in said and value != usual[name]
    ]
