"""A recipe as text: YAML to a tree of keys and values, overrides by `--set`, and the line of each key. `schema` knows the keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from afina.errors import RecipeError
from afina.redact import redact

__all__ = ["apply_override", "read_yaml", "where"]

DEEPEST = 50


def read_yaml(text: str, source: str) -> tuple[Node | None, Any]:
    """The parsed nodes with their lines, and the values; YAML 1.2.

    Raises:
        RecipeError: not YAML, or a key twice; with the line.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        _check_depth(yaml, text, source)
        return yaml.compose(StringIO(text)), yaml.load(StringIO(text))
    except DuplicateKeyError as error:
        # ruamel prints values of both, which for a section is only "{}".
        key = re.search(r'duplicate key "(.*?)" with value', str(error.problem))
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(
            f"{source}{line}: the key{f' `{key[1]}`' if key else ''} is there already", "keep one of the two"
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context).split("\n")[0].split())
        remedy = (
            "indent with spaces; YAML allows no tabs"
            if "'\\t'" in problem
            else "check the indentation and quotes around that line"
        )
        raise RecipeError(f"{source}{line}: not valid YAML: {problem}", remedy) from None
    except (YAMLError, ValueError) as error:
        position = getattr(error, "position", None)
        line = f":{text.count(chr(10), 0, position) + 1}" if isinstance(position, int) else ""
        raise RecipeError(
            f"{source}{line}: not valid YAML: {str(error).splitlines()[0]}", "remove that character"
        ) from None


def _check_depth(yaml: YAML, text: str, source: str) -> None:
    """Refuse what would exhaust Python's stack, whose depth depends on who calls: composing recurses, parsing does not."""
    depth = 0
    for event in yaml.parse(StringIO(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > DEEPEST:
            raise RecipeError(f"{source}: not a recipe: nested too deeply", "start from slurm/recipes/yelp.yaml")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in `tree`, the value read as YAML.

    Raises:
        RecipeError: not of that form, or a key below a value.
    """
    path, equals, text = override.partition("=")
    keys = [k.strip() for k in path.split(".")]
    if not equals or not all(keys):
        raise RecipeError(
            f"--set {redact(override)}: not of the form key.sub=value", "for example --set train.learning_rate=3e-5"
        )
    try:
        value = YAML(typ="safe", pure=True).load(text) if text.strip() else None
    except (YAMLError, ValueError, RecursionError):
        value = text
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)
    here: dict[str, Any] = tree
    for depth, key in enumerate(keys[:-1], start=1):
        below = here.get(key)
        if below is not None and not isinstance(below, dict):
            raise RecipeError(
                f"--set {redact(override)}: `{key}` is a value, it has no keys",
                f"set `{'.'.join(keys[:depth])}` itself",
            )
        # A copy: all occurrences of a YAML alias are one object, and only this one is overridden.
        here[key] = dict(below or {})
        here = here[key]
    here[keys[-1]] = value


def where(root: Node | None, source: str, keys: list[str], overridden: list[str]) -> str:
    """`--set KEY` where an override gave the value, `FILE:LINE` where the file did, both where they disagree."""
    dotted = ".".join(keys)
    for given in reversed(overridden):
        if dotted == given or dotted.startswith(given + "."):
            return f"--set {dotted}"
    line, whole = _line(root, keys)
    below = [given for given in overridden if not dotted or given.startswith(dotted + ".")]
    if below and not whole:
        return f"--set {below[-1]}"
    return f"{source}{line}" + (f" with --set {below[-1]}" if below and dotted else "")


def _line(root: Node | None, keys: Sequence[str]) -> tuple[str, bool]:
    """`:LINE` of the deepest key that is in the file, and whether that is the last of `keys`."""
    node, line, whole = root, None, True
    for key in keys:
        if isinstance(node, MappingNode):
            for k, v in node.value:
                if isinstance(k, ScalarNode) and k.value == key:
                    node, line = v, k.start_mark.line + 1
                    break
            else:
                whole = False
                break
        elif isinstance(node, SequenceNode) and key.isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
        else:
            whole = isinstance(node, ScalarNode) and key == "0"  # one text stands for a list of one
            break
    return f":{line}" if line else "", whole
