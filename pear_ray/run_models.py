"""The shapes of the models that a run names."""

from pathlib import Path

from pear_ray.config.run import RunConfig
from pear_ray.engines.model_files import config_folder
from pear_ray.errors import ConfigError, InputError
from pear_ray.memory.phases import ModelShapes, read_shapes


def run_models(config: RunConfig) -> ModelShapes:
    """Policy and behavior models of `config`, from their `config.json`.

    Raises:
        ConfigError: A location cannot mean a model; the key is named.
        InputError: A model's sizes cannot be read.
    """
    behavior = config.models.behavior or {}
    if isinstance(behavior, str):
        folders = {"*": _folder("models.behavior", behavior)}
    else:
        folders = {name: _folder(f"models.behavior.{name}", at) for name, at in behavior.items()}
    return read_shapes(_folder("models.policy", config.models.policy), folders)


def _folder(key: str, location: str) -> Path:
    try:
        return config_folder(location)
    except (ConfigError, InputError) as error:
        raise type(error)(f"{key}: {error}") from error
