"""Checks for additions to the library: one call tests all properties of a loss, term or method.

A check raises an `AssertionError` of one line with the property, the argument and the numbers. It
needs no test framework.
"""

from logitjax.testing._family import check_family as check_family
from logitjax.testing._loss import check_loss as check_loss
from logitjax.testing._method import check_method as check_method
from logitjax.testing._term import check_term as check_term
