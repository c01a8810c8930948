"""The config: every key with its default, reading it from files, and checking it."""

from .defaults import add_hiervl_config
from .device import use_cpu_without_gpu, visible_devices, why_no_gpu
from .load import RENAMED, config_keys, load_config, read_config_file
from .validate import validate

__all__ = [
    "RENAMED",
    "add_hiervl_config",
    "config_keys",
    "load_config",
    "read_config_file",
    "use_cpu_without_gpu",
    "validate",
    "visible_devices",
    "why_no_gpu",
]
