__version__ = "0.1.0"

_PLACES = dict(scan=('command', 'scan_model'), clean=('command', 'clean_model'), make_defender=('images', 'make_defender'))


def __getattr__(name):
    "The few names that a user needs, imported when they are asked for: `import invertune` itself loads nothing."
    if name not in _PLACES: raise AttributeError(f"module 'invertune' has no attribute '{name}'")
    from importlib import import_module
    module, there = _PLACES[name]
    return getattr(import_module(f'invertune.{module}'), there)


def __dir__(): return sorted([*globals(), *_PLACES])
