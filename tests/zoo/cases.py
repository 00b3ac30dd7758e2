"""All cases of the zoo by name."""

from __future__ import annotations

from tests.zoo import handwritten, scheme, transformers_more, transformers_zoo
from tests.zoo.case import Case

CASES: dict[str, Case] = {
    case.name: case for case in [*transformers_zoo.CASES, *handwritten.CASES, *scheme.CASES, *transformers_more.CASES]
}

GROUPS: dict[str, list[str]] = {
    "all": list(CASES),
    "transformers": [case.name for case in transformers_zoo.CASES],
    "handwritten": [case.name for case in handwritten.CASES],
    "scheme": [case.name for case in scheme.CASES],
    "more": [case.name for case in transformers_more.CASES],
}
"""Names that stand for several cases."""
