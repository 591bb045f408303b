"""Settings as they are typed: YAML files and the values of --set.

Which settings there are, and what they may be, is in profiles.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..profiles import flat_settings, get_profile
from ..support.errors import SettingError


def settings_from_yaml(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML file as keyword arguments for ``get_profile``, with dotted keys.

    ``profile: NAME`` in the file chooses the profile. Raises SettingError naming file and key.
    """
    import yaml

    example = "Write it as key: value lines, such as training.epochs: 1."
    try:
        content = yaml_value(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{path} can't be read: {error.strerror}.", "Give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not YAML: {' '.join(str(error).split())}.", example) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingError(f"{path} holds no settings.", example)
    name = content.pop("profile", None)
    settings = flat_settings(content)
    try:
        get_profile(name, **settings)
    except SettingError as error:
        raise SettingError(f"{path}: {error.problem}", error.fix) from None
    return settings if name is None else {"name": name, **settings}


def yaml_value(text: str) -> Any:
    """What YAML text means. Reads 5e-4 as a number, as YAML 1.2 does; PyYAML alone takes it for text."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return yaml.load(text, Loader)
