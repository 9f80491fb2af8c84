"""What a model is to everyone else: a kind of network that is built for an input and a number of outputs.

One of your own is a function, ``model.name=my_module:build``, called with ``input_shape``, ``classes`` and
the section's other keys; or, with declared fields, a dataclass ``model.name=my_module:Mine``::

    @dataclass(frozen=True, kw_only=True)
    class Mine(Architecture):
        '''One hidden layer.'''

        width: int = hyperparameter(8, "units of the hidden layer", low=1)

        def build(self, input_shape, classes):
            return nn.Sequential(nn.Flatten(), nn.LazyLinear(self.width), nn.ReLU(), nn.LazyLinear(classes))
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from cluster.configuration.choices import ChoiceError
from cluster.references import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """A kind of network; its fields are its options."""

    @property
    def initialised_here(self) -> bool:
        """Whether ``cluster.workload.models.initialise`` draws its weights; else they stay as built."""
        return False

    def built(self, input_shape: tuple[int, ...], classes: int, vocabulary: int) -> Any:
        """What :meth:`build` makes; of a text it is told ``vocabulary``, how many tokens there are."""
        return self.build(input_shape, classes, **_told(self.build, vocabulary))

    @abstractmethod
    def build(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """The network, on the CPU.

        Args:
            input_shape: Shape of one sample: (channels, height, width) of an image.
            classes: Number of outputs, of classes one logit each.
        """

    @staticmethod
    def of(key: str, name: str, builder: Callable[..., Any], options: Mapping[str, Any]) -> Architecture:
        """The architecture that a user's function or module class builds.

        Raises:
            ChoiceError: It is not callable, or takes no such options.
        """
        try:
            parameters = inspect.signature(builder).parameters
        except (TypeError, ValueError) as error:
            raise ChoiceError(f"{key} = {name!r}: {error}") from None
        allowed = [each for each in parameters if each not in ("input_shape", "classes")]
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
            for option in options:
                if option not in allowed:
                    raise ChoiceError(
                        f"model.{option} is no option of {name!r}; allowed are "
                        f"{', '.join(allowed) or 'none'}{did_you_mean(option, allowed)}"
                    )
        return _Built(builder=builder, options=dict(options))


@dataclass(frozen=True, kw_only=True)
class _Built(Architecture):
    """What a user's function builds."""

    builder: Callable[..., Any]
    options: Mapping[str, Any]

    def build(self, input_shape: tuple[int, ...], classes: int, vocabulary: int = 0) -> nn.Module:
        """See :class:`Architecture`."""
        options = {**_told(self.builder, vocabulary), **self.options}
        made: nn.Module = self.builder(input_shape=input_shape, classes=classes, **options)
        return made


def _told(builder: Callable[..., Any], vocabulary: int) -> dict[str, int]:
    taken = vocabulary and "vocabulary" in inspect.signature(builder).parameters
    return {"vocabulary": vocabulary} if taken else {}
