"""The distribution function of the normal distribution, which NumPy lacks.

Source: the rational functions of Cody 1969, "Rational Chebyshev approximations for the error function", with the
coefficients of the Cephes library (``ndtr.c``).
"""

from __future__ import annotations

import numpy as np

_ERF = (
    (9.60497373987051638749e0, 9.00260197203842689217e1, 2.23200534594684319226e3, 7.00332514112805075473e3,
     5.55923013010394962768e4),
    (1.0, 3.35617141647503099647e1, 5.21357949780152679795e2, 4.59432382970980127987e3, 2.26290000613890934246e4,
     4.92673942608635921086e4),
)  # fmt: skip
"""erf(a) is a times this function of a^2, for a up to 1."""
_ERFC = (
    (2.46196981473530512524e-10, 5.64189564831068821977e-1, 7.46321056442269912687e0, 4.86371970985681366614e1,
     1.96520832956077098242e2, 5.26445194995477358631e2, 9.34528527171957607540e2, 1.02755188689515710272e3,
     5.57535335369399327526e2),
    (1.0, 1.32281951154744992508e1, 8.67072140885989742329e1, 3.54937778887819891062e2, 9.75708501743205489753e2,
     1.82390916687909736289e3, 2.24633760818710981792e3, 1.65666309194161350182e3, 5.57535340817727675546e2),
)  # fmt: skip
"""erfc(a) is exp(-a^2) times this function of a, for a from 1 to 8."""


def distribution(x: np.ndarray) -> np.ndarray:
    """The probability that a normally distributed number is below x, float64; 0 where it is below 1e-28."""
    a = np.abs(x) * 0.5**0.5
    tail = np.where(a < 1, 1 - _near(np.minimum(a, 1)), _far(np.clip(a, 1, 8)) * (a < 8)) / 2
    return np.where(x > 0, 1 - tail, tail)


def _near(a: np.ndarray) -> np.ndarray:
    """erf(a)."""
    return a * np.polyval(_ERF[0], a * a) / np.polyval(_ERF[1], a * a)


def _far(a: np.ndarray) -> np.ndarray:
    """erfc(a)."""
    return np.exp(-a * a) * np.polyval(_ERFC[0], a) / np.polyval(_ERFC[1], a)
