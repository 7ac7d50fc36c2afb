"""Make a tuner known to PEFT and transformers: the only file that touches PEFT's enum and mapping tables."""

from __future__ import annotations

import warnings
from typing import Any

from .internals import PeftType, mapping, register_peft_method


def peft_type(name: str) -> PeftType:
    """
    The member of PEFT's enum for a method, added if PEFT does not have it.

    PEFT refuses methods that are not members, and transformers reads `peft_type.value`, so a plain string won't do.
    The member is added in place and behaves like the others (by name, by value, pickling, copying, JSON).
    """
    name = name.upper()
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_cls: type, model_cls: type) -> bool:
    """
    Register a tuner under a lower-case name; its parameters begin with `<name>_`. Calling it again, also after a
    reload, changes nothing but the classes.

    Returns `False`, with a warning, if PEFT itself has a method of this name, which then is used.
    """
    member = peft_type(name)
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and not _is_ours(known):
        warnings.warn(
            f"PEFT has a method named {member.value} of its own ({known.__module__}.{known.__qualname__}); it is "
            "used, and peft_ext's method of that name is not registered.",
            stacklevel=2,
        )
        return False
    if known is not None:
        for table in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING):
            table.pop(member, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    return True


def _is_ours(cls: Any) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]
