r"""What a search could not have missed, and what it could.

No search shows that nothing else is there. This module states what is excluded, in two ways.

**By starts.** Every one of N independent starts, drawn from a stated law, is followed downhill to
the basin where it ends. A basin that catches a share p of starts is missed by all of them with
probability :math:`(1 - p)^N`; so each p above

.. math:: p_{95} = 1 - 0.05^{1/N}

would have been seen with 95 %. If k of the N starts ended in basins that nobody followed up, the
bound is the one of Clopper and Pearson for k of N, which for k = 0 is the same.

**By points.** A narrow mode without a basin of its own (a golf hole) draws no descent from afar.
It is met if one of M independent points, of density q at its place, lies where the mode's density
exceeds that of the rest. For a Gaussian mode of width s and mass m, in a rest that is like a
Gaussian of width S in d dimensions, that is a ball of radius

.. math:: r(s, m) = s \sqrt{2 \left[\log \frac{m}{1 - m} + d \log \frac{S}{s}\right]_+},

which is met with probability :math:`1 - (1 - q V_d r^d)^M`, :math:`V_d` the volume of the unit
ball. :meth:`Coverage.width` solves this for the smallest s that is met with 95 %. The density q is
that at the rim of the rest, :math:`S \sqrt d` from its middle; for an exploration it is that ten
times as far out. Lengths are those of the user's
coordinates, or, if some but not all of these are bounded, of unbounded ones. This is an estimate,
not a bound: where the rest is not a Gaussian, and closer to or farther from its middle, the radius
and the density differ.

References:
    | The use of confidence or fiducial limits illustrated in the case of the binomial
    | (Clopper and Pearson, 1934)
    | https://doi.org/10.1093/biomet/26.4.404
"""

import math
from dataclasses import dataclass

__all__ = ["Coverage"]

_MISSED = 0.05  # probability of a miss that a statement allows: 95 % confidence, as is customary


@dataclass(frozen=True)
class Coverage:
    """A statement of what was searched, and what could have been missed; print it.

    Attributes:
        region: The region searched and the law of the starts, in words.
        starts: Number of independent starts that were drawn from that law and followed downhill.
        unknown: How many of them ended in basins whose mass was not estimated; normally 0.
        basins: Number of basins found, by these starts or otherwise.
        points: Number of independent points with a density at which the energy was evaluated.
        density: Log-density of these points at the rim of the target, or farther out.
        spread: Width S of the target there: the geometric mean over directions.
        dim: Number of coordinates.

    Example:
        >>> coverage = Coverage("the box", starts=373)
        >>> round(coverage.excluded, 4)
        0.008
    """

    region: str
    starts: int
    unknown: int = 0
    basins: int = 0
    points: int = 0
    density: float = -math.inf
    spread: float = math.nan
    dim: int = 1

    def __post_init__(self) -> None:
        if self.starts < 0:
            raise ValueError(f"starts must be at least 0, got {self.starts}")
        if not 0 <= self.unknown <= self.starts:
            raise ValueError(
                f"unknown must be between 0 and starts = {self.starts}, got {self.unknown}"
            )

    @property
    def excluded(self) -> float:
        """The largest share of starts of a basin that could have been missed (95 %).

        A basin that catches more would have been seen with at least 95 %. 1 if nothing is
        excluded.
        """
        if self.unknown == self.starts:
            return 1.0
        if self.unknown == 0:
            return 1.0 - _MISSED ** (1 / self.starts)
        from scipy import stats  # slow to import, and rarely needed

        # Clopper and Pearson's upper limit.
        law = stats.beta(self.unknown + 1, self.starts - self.unknown)
        return float(law.ppf(1 - _MISSED))

    def width(self, mass: float) -> float:
        """Smallest width of a mode of that mass that the points would have met with 95 %.

        Arguments:
            mass: The mode's share of the total, between 0 and 1.

        Returns:
            The width s by the formula of the module's docstring;
            ``inf`` if no narrow mode would have been met.

        Raises:
            ValueError: If mass is not between 0 and 1.
        """
        if not 0 < mass < 1:
            raise ValueError(f"mass must be between 0 and 1, got {mass}")
        if self.points < 1 or not (math.isfinite(self.density) and self.spread > 0):
            return math.inf
        d = self.dim
        log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
        log_wanted = math.log(1 - _MISSED ** (1 / self.points)) - self.density - log_ball
        odds = math.log(mass / (1 - mass))
        # r grows with s up to where its square root is as wide as the law allows.
        top = self.spread * math.exp(min(0.0, odds / d - 0.5))

        def log_radius(s: float) -> float:
            inside = odds + d * math.log(self.spread / s)
            return math.log(s) + 0.5 * math.log(2 * inside) if inside > 0 else -math.inf

        if d * log_radius(top) < log_wanted:
            return math.inf
        low, high = math.log(top) - 60.0, math.log(top)
        for _ in range(100):
            middle = 0.5 * (low + high)
            if d * log_radius(math.exp(middle)) < log_wanted:
                low = middle
            else:
                high = middle
        return math.exp(high)

    def __str__(self) -> str:
        if self.starts == 0:
            return f"{self.region}: no start was followed, nothing is excluded"
        found = "1 basin" if self.basins == 1 else f"{self.basins} basins"
        text = (
            f"{self.region}; {self.starts:,} independent starts ended in {found}"
            + (f", {self.unknown} of them in basins not followed up" if self.unknown else "")
            + f"; a basin that catches more than {_percent(self.excluded)} of starts would have "
            "been seen with 95 %"
        )
        width = self.width(0.5)
        if math.isfinite(width):
            return text + (
                f"; a mode of half the mass without a basin, narrower than about {width:.2g} "
                f"({_percent(width / self.spread)} of the target's width), is out of reach"
            )
        return text + (
            f"; narrow modes without a basin are out of reach: {self.points:,} points are too few "
            f"to meet any in {self.dim} dimensions"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
