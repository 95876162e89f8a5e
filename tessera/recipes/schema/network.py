"""What every network says of itself in a recipe."""

from __future__ import annotations

from typing import ClassVar

from tessera.recipes.schema.base import Section


class NetworkSection(Section):
    """What every network says of itself; rules of recipes ask for that, and not for kinds."""

    own_coordinates: ClassVar[bool] = False
    """Knows where its pixels lie by itself; others get coordinates as input if a recipe asks."""

    takes_image: ClassVar[bool] = False
    """Takes a picture to start from as further channels of its input."""

    has_energy: ClassVar[bool] = False
    """Its output is the gradient of an energy, on which samples can descend."""

    external: ClassVar[bool] = False
    """The caller's own: nothing is known of it."""

    @property
    def learns_step_size(self) -> bool:
        """Whether the step size of descent on its energy is a parameter."""
        return False

    @property
    def recomputes(self) -> bool:
        """Whether it computes blocks again going back, for less memory."""
        return False

    family: ClassVar[str] = "denoiser"
    """Of which kind of model it is the network; objective and sampler must be of the same."""

    @property
    def learns_variance(self) -> bool:
        """Whether it has an output for the variance of reverse steps."""
        return False

    @property
    def stages(self) -> int:
        """Number of estimates that it gives out, one by each part; it can be cut behind any."""
        return 1

    @property
    def sampling_options(self) -> Section | None:
        """What it can do while sampling, with the defaults; None for nothing."""
        return None

    def fits(self, side: int) -> bool:
        """Whether the network takes images of this height or width."""
        raise NotImplementedError

    @property
    def sides(self) -> str:
        """Which heights and widths it takes, and why."""
        raise NotImplementedError

    def check(self, side: int) -> None:
        """Raise for a side that fits, but at which the network cannot be built.

        Raises:
            ValueError: in words for the user.
        """
