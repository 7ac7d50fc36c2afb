"""Names of the ways to adapt a part of a LLaVA, which a command can check without torch."""

from __future__ import annotations

import re


NAMES = (
    "full, lora-<rank>, ia3, oft, oft-<block>, bitfit, loreft-<rank>, neuroada-<k>, mores-b, mores-l, mores-h, "
    "mores-<rank>@<percent of visual tokens>, the same with a + (trains the connector too), connector-<rank> or "
    "projector"
)
_NAME = re.compile(
    r"(?P<kind>full|ia3|projector|bitfit)|(?P<sized>lora|oft|connector|neuroada|loreft)(-(?P<size>[1-9]\d*))?"
    r"|mores-(?P<letter>[blh])|mores(-(?P<rank>[1-9]\d*))?(@(?P<percent>[1-9]\d?|100))?(\+)?"
)


def matched_name(name: str) -> re.Match[str]:
    """
    The parts of a method's name; see [`~peft_ext.factory.methods.Method`].

    Raises:
        `ValueError`: if there is no such method.
    """
    if name.split("-")[0] == "adapter":
        raise ValueError(
            f"method={name!r}: PEFT has no bottleneck adapters (Houlsby et al.), so this row of the paper's table "
            f"is left out. Use {NAMES}"
        )
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"method={name!r} is not known: use {NAMES}")
    return match
