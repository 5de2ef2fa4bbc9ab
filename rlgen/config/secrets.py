"""No secret in what a run writes or says.

Owns what counts as a secret in a text: credentials and signatures in URLs, and the values of
environment variables that hold keys, tokens and passwords.
"""

import os
import re
from typing import Any

_HIDDEN = "***"
_SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY)", re.I)
_FEWEST_CHARACTERS = 8
"""A shorter value of such a variable would blank ordinary words."""
_USER = re.compile(r"(^|[\s/\"'(])[^/@\s:\"']*:[^/@\s\"']+@")
_QUERY = re.compile(r"(\w+://[^\s?#'\"]+\?)[^\s'\"]+")


def scrubbed(text: str) -> str:
    """The text with *** in place of every secret."""
    for name, value in os.environ.items():
        is_path = "/" in value and os.path.exists(value)
        if _SECRET_NAME.search(name) and len(value) >= _FEWEST_CHARACTERS and not is_path:
            text = text.replace(value, _HIDDEN)
    return _QUERY.sub(rf"\1{_HIDDEN}", _USER.sub(rf"\1{_HIDDEN}@", text))


def scrubbed_tree(value: Any) -> Any:
    """Nested dicts and lists with every string scrubbed."""
    if isinstance(value, str):
        return scrubbed(value)
    if isinstance(value, dict):
        return {key: scrubbed_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed_tree(item) for item in value]
    return value


def is_scrubbed(value: Any) -> bool:
    """Whether a secret was left out of this value, which is therefore of no use."""
    return isinstance(value, str) and _HIDDEN in value
