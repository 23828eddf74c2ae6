"""LoRA's mathematics, checked: properties, each with its equation, its paper and a computed bound.

case         what a property is measured on, and the formula that it is measured against
measuring    a measurement beside its bound
lora, layers, dora, adalora, codes, tasks, sums, pruning, optimizers, ends, starts
             the properties, by what promises them
properties   the list, and where bounds come from
run          all of it over random layers, or over given files
studies      a small model that is trained, which a theorem is measured on
dials, steps, gauge, updates, merges, forgetting
             the theorems of training, by what they are about
training     their list, and all of it over random models
"""

from .case import Case, Formula, cases_of, make_case, over_codes, random_case
from .measuring import Measured, Property
from .properties import PROPERTIES
from .run import Finding, Report, Row, measure, verify, verify_files
from .studies import Study, random_study
from .training import THEOREMS, verify_training

__all__ = [
    "PROPERTIES",
    "THEOREMS",
    "Case",
    "Finding",
    "Formula",
    "Measured",
    "Property",
    "Report",
    "Row",
    "Study",
    "cases_of",
    "make_case",
    "measure",
    "over_codes",
    "random_case",
    "random_study",
    "verify",
    "verify_files",
    "verify_training",
]
