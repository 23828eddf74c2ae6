"""LoRA's mathematics, checked: properties, each with its equation, its paper and a computed bound.

case         what a property is measured on, and the formula that it is measured against
measuring    a measurement beside its bound
lora, layers, dora, adalora, codes, tasks, sums, pruning, optimizers, ends, starts
             the properties, by what promises them
properties   the list, and where bounds come from
run          all of it over random layers, or over given files
"""

from .case import Case, Formula, cases_of, make_case, over_codes, random_case
from .measuring import Measured, Property
from .properties import PROPERTIES
from .run import Finding, Report, Row, measure, verify, verify_files

__all__ = [
    "PROPERTIES",
    "Case",
    "Finding",
    "Formula",
    "Measured",
    "Property",
    "Report",
    "Row",
    "cases_of",
    "make_case",
    "measure",
    "over_codes",
    "random_case",
    "verify",
    "verify_files",
]
